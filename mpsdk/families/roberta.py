"""RoBERTa (Liu et al. 2019, arXiv:1907.11692) as `transformers.RobertaForMaskedLM` defines it."""

from __future__ import annotations

from mpsdk.families import bert_like
from mpsdk.families.family import Family
from mpsdk.families.fields import Fields
from mpsdk.families.heads import FamilyHead, token_classifier
from mpsdk.families.rules import renamed
from mpsdk.families.spec import Head, TransformerSpec

PREFIX = "roberta."


def read(fields: Fields) -> TransformerSpec:
    padding = fields.integer("pad_token_id", 1, minimum=0)
    return bert_like.read(fields, "roberta", vocab_size=50265, position_padding=padding)


def write(spec: TransformerSpec) -> dict[str, object]:
    return bert_like.write(spec) | {"pad_token_id": spec.position_padding}


ROBERTA = Family(
    model_type="roberta",
    prefix=PREFIX,
    read=read,
    write=write,
    body=bert_like.body(PREFIX),
    heads=(
        FamilyHead(
            "RobertaForMaskedLM",
            Head(objective="masked-lm", bias=True, transform="gelu"),
            (
                *renamed("lm_head.dense", "head.transform"),
                *renamed("lm_head.layer_norm", "head.transform_norm"),
                *bert_like.output("lm_head.decoder", "lm_head.bias"),
            ),
        ),
        FamilyHead(
            "RobertaForSequenceClassification",
            Head(objective="sequence-classification", bias=True, pooler=True, pooled="first"),
            (
                *renamed("classifier.dense", "head.pooler"),
                *renamed("classifier.out_proj", "head.classifier"),
            ),
            bert_like.classifier_dropout,
        ),
        token_classifier(
            "RobertaForTokenClassification", layer="classifier", dropout=bert_like.classifier_dropout
        ),
    ),
    ignored=(
        "roberta.embeddings.position_ids",  # in files of transformers 4
        *("lm_head.bias", "lm_head.decoder.bias"),  # one is the other, or unread
        *("roberta.pooler.dense.weight", "roberta.pooler.dense.bias"),  # which none of these heads reads
    ),
    spellings=bert_like.SPELLINGS,
)
