"""BERT (Devlin et al. 2018, arXiv:1810.04805) as `transformers.BertForMaskedLM` defines it."""

from __future__ import annotations

from mpsdk.families import bert_like
from mpsdk.families.family import Family
from mpsdk.families.fields import Fields
from mpsdk.families.heads import FamilyHead, token_classifier
from mpsdk.families.rules import renamed
from mpsdk.families.spec import Head, TransformerSpec

PREFIX = "bert."


def read(fields: Fields) -> TransformerSpec:
    return bert_like.read(fields, "bert", vocab_size=30522, position_padding=None)


BERT = Family(
    model_type="bert",
    prefix=PREFIX,
    read=read,
    write=bert_like.write,
    body=bert_like.body(PREFIX),
    heads=(
        FamilyHead(
            "BertForMaskedLM",
            Head(objective="masked-lm", bias=True, transform="gelu"),
            (
                *renamed("cls.predictions.transform.dense", "head.transform"),
                *renamed("cls.predictions.transform.LayerNorm", "head.transform_norm"),
                *bert_like.output("cls.predictions.decoder", "cls.predictions.bias"),
            ),
            transforms_as_blocks=True,
        ),
        FamilyHead(
            "BertForSequenceClassification",
            Head(objective="sequence-classification", bias=True, pooler=True, pooled="first"),
            (
                *renamed("bert.pooler.dense", "head.pooler"),
                *renamed("classifier", "head.classifier"),
            ),
            bert_like.classifier_dropout,
        ),
        token_classifier(
            "BertForTokenClassification", layer="classifier", dropout=bert_like.classifier_dropout
        ),
    ),
    ignored=(
        "bert.embeddings.position_ids",  # in files of transformers 4
        *("cls.predictions.bias", "cls.predictions.decoder.bias"),  # one is the other, or unread
        *("cls.seq_relationship.weight", "cls.seq_relationship.bias"),  # next sentence prediction
    ),
    spellings=bert_like.SPELLINGS,
)
