"""Models that mpsdk has no family for: cut by the plan that they bring, by one's own, by twins; sharded by their blocks."""

from __future__ import annotations

import pytest

from tests.cases import BOUND
from tests.torch.pool import WorkerPool
from tests.torch.splitting import ARCHITECTURES, Compared, compare, compare_sharded

QUICK = ("cohere", "exaone4", "gemma2", "granite", "olmo2", "phi3", "starcoder2")


@pytest.mark.parametrize(
    "architecture",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in ARCHITECTURES],
)
def test_a_model_of_transformers_is_cut_by_its_own_plan(pool: WorkerPool, architecture: str) -> None:
    for seen in pool.run(2, compare, architecture, {}):
        assert_the_same(seen)


def assert_the_same(seen: Compared, share: float = 0.65) -> None:
    assert seen.loss == pytest.approx(seen.expected_loss, rel=BOUND)
    assert not seen.wrong
    assert seen.share < share


@pytest.mark.parametrize("architecture", ["gemma2", "granite"])
def test_tied_and_untied_embeddings_are_cut(pool: WorkerPool, architecture: str) -> None:
    for tied in (True, False):
        for seen in pool.run(2, compare, architecture, {"tie_word_embeddings": tied}):
            assert_the_same(seen)
            assert seen.tied is tied


def test_ones_own_plan_stands_over_the_models(pool: WorkerPool) -> None:
    plan = {"model.layers.*.mlp.*": None, "lm_head": None, "model.embed_tokens": None}
    for seen in pool.run(2, compare, "granite", {}, plan):
        assert_the_same(seen, share=0.9)
        assert seen.share > 0.65


@pytest.mark.parametrize("how", ["fsdp1", "fsdp2"])
@pytest.mark.parametrize("architecture", ["gemma2", pytest.param("exaone4", marks=pytest.mark.long)])
def test_rank_0s_weights_are_cut_and_sharded(pool: WorkerPool, architecture: str, how: str) -> None:
    for seen in pool.run(4, compare_sharded, architecture, how):
        assert_the_same(seen)
