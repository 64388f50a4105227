"""Configurations for property tests: valid ones in every spelling, almost valid ones, and anything JSON-like."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from mpsdk.config import Distribution, Job, Section, Training

AXES = ("pp", "dp", "sdp", "cp", "tp")

counts = st.integers(1, 64)
paths = st.text(min_size=1, max_size=12)
floats = {"allow_nan": False, "allow_infinity": False}


def numbers(
    low: float, high: float, *, exclude_min: bool = False, exclude_max: bool = False
) -> st.SearchStrategy[Any]:
    return st.floats(low, high, exclude_min=exclude_min, exclude_max=exclude_max, **floats)


def sections(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Mappings with any of `fields`."""
    return st.fixed_dictionaries({}, optional=fields)


@st.composite
def pipelines(draw: st.DrawFn) -> Any:
    degree = draw(st.integers(1, 8))
    names = ["gpipe", "1f1b"] if degree == 1 else ["gpipe", "1f1b", "zb-h1", "zb-v", "interleaved"]
    schedule = draw(st.sampled_from(names))
    virtual = draw({"zb-v": st.just(2), "interleaved": st.integers(2, 4)}.get(schedule, st.just(1)))
    step = degree if schedule == "interleaved" else 1
    pipeline: dict[str, Any] = {"degree": degree, "schedule": schedule, "virtual_stages": virtual}
    if draw(st.booleans()):
        pipeline["microbatches"] = draw(st.none() | st.integers(1, 9).map(lambda count: count * step))
    if draw(st.booleans()):
        size = degree * virtual
        pipeline["partition"] = draw(st.just("auto") | st.lists(counts, min_size=size, max_size=size))
    elif draw(st.booleans()):
        pipeline["memory_weight"] = draw(numbers(0, 1) | st.sampled_from([0, 1]))
    return draw(st.sampled_from([pipeline, degree]))


@st.composite
def recomputations(draw: st.DrawFn) -> Any:
    operations = st.lists(st.sampled_from(["attention", "matmul"]), min_size=1, unique=True)
    return draw(
        st.sampled_from(["none", "selective", "full"])
        | sections(mode=st.just("full"), offload=st.just(False))
        | st.fixed_dictionaries({"mode": st.just("selective")}, optional={"keep": operations})
        | st.fixed_dictionaries({"mode": st.just("full"), "offload": st.booleans()})
    )


def precisions() -> st.SearchStrategy[Any]:
    scaled = st.fixed_dictionaries(
        {"mode": st.just("fp16")},
        optional={
            "initial_loss_scale": numbers(0, 2**40, exclude_min=True) | counts,
            "loss_scale_growth_interval": counts,
        },
    )
    return st.sampled_from(["fp32", "bf16", "fp16"]) | scaled


def distributions() -> st.SearchStrategy[dict[str, Any]]:
    """What `Distribution.parse` must take: every section left out, in short, or as a mapping."""
    optimizer = st.fixed_dictionaries({"level": st.just("optimizer"), "prefetch": st.integers(0, 1)})
    return sections(
        sharded_data_parallel=counts
        | sections(
            degree=counts, level=st.sampled_from(["parameters", "gradients"]), prefetch=st.integers(0, 4)
        )
        | optimizer,
        tensor_parallel=counts | sections(degree=counts, sequence_parallel=st.booleans()),
        pipeline=pipelines(),
        data_parallel=counts | st.just("fill"),
        activation_checkpointing=recomputations(),
        precision=precisions(),
        compile=st.sampled_from([True, False, "auto", {}, {"enabled": "auto"}]),
        checkpoint=counts
        | sections(
            every=st.none() | counts,
            keep=st.none() | counts,
            asynchronous=st.booleans(),
            directory=st.none() | paths,
        ),
        placement=st.none() | st.permutations(AXES).map(",".join),
    )


@st.composite
def trainings(draw: st.DrawFn) -> dict[str, Any]:
    """What `Training.parse` must take."""
    accumulation, steps = draw(st.integers(1, 8)), draw(st.integers(1, 1000))
    rate = draw(numbers(0, 10))
    training: dict[str, Any] = {
        "steps": steps,
        "accumulation": accumulation,
        "global_batch": accumulation * draw(counts),
        "learning_rate": rate,
        "warmup_steps": draw(st.integers(0, steps)),
        "learning_rate_schedule": draw(st.sampled_from(["constant", "linear", "cosine"])),
        "optimizer": draw(st.sampled_from(["adamw", "sgd"])),
    }
    if training["learning_rate_schedule"] != "constant":
        training["minimum_learning_rate"] = draw(numbers(0, 1)) * rate
    below_one = numbers(0, 1, exclude_max=True)
    if training["optimizer"] == "sgd":
        training["momentum"] = draw(below_one)
    else:
        training["betas"] = draw(st.lists(below_one, min_size=2, max_size=2))
        training["epsilon"] = draw(numbers(0, 1, exclude_min=True))
    others = sections(
        sequence_length=counts,
        weight_decay=numbers(0, 1),
        max_grad_norm=st.none() | numbers(0, 100, exclude_min=True),
        dropout=st.none() | below_one,
        tokenizer=paths,
        log_every=counts,
        evaluate_every=st.none() | counts,
        seed=st.integers(0, 2**63 - 1),
    )
    return training | draw(others) | draw(objectives())


@st.composite
def objectives(draw: st.DrawFn) -> dict[str, Any]:
    """An objective and the settings that it alone takes."""
    names = ["causal-lm", "masked-lm", "sequence-classification", "token-classification"]
    settings: dict[str, Any] = {"objective": draw(st.sampled_from(names))}
    columns = draw(st.lists(paths, min_size=3, max_size=3, unique=True))
    if draw(st.booleans()):
        settings["text_column"] = columns[0]
    if settings["objective"] == "masked-lm":
        settings["mask_probability"] = draw(numbers(0, 1, exclude_min=True, exclude_max=True))
    if settings["objective"] == "sequence-classification" and draw(st.booleans()):
        settings["pair_column"] = columns[1]
    if settings["objective"].endswith("-classification"):
        settings["label_column"] = columns[2]
    return settings


def jobs() -> st.SearchStrategy[dict[str, Any]]:
    """What `Job.parse` must take."""
    configurations = st.fixed_dictionaries(
        {"model_type": st.sampled_from(["gpt2", "llama"])}, optional={"n": json_like()}
    )
    model = st.fixed_dictionaries({"model": paths | configurations}) | st.fixed_dictionaries(
        {"entry_point": paths}
    )
    others = sections(
        framework=st.sampled_from(["torch", "tensorflow"]),
        distribution=distributions(),
        training=trainings(),
        data=paths
        | sections(
            train=st.none() | paths,
            validation=st.none() | paths | numbers(0, 1, exclude_min=True, exclude_max=True),
        ),
        launcher=paths
        | sections(name=paths, processes=st.none() | counts, timeout=numbers(0, 1e6, exclude_min=True)),
        output_dir=paths,
        resume=paths,
        profile=profiles(),
    )
    return st.builds(dict.__or__, model, others)


def profiles() -> st.SearchStrategy[Any]:
    steps = counts | st.lists(counts, min_size=1, unique=True)
    ranks = st.just("all") | st.lists(st.integers(0, 7), min_size=1, unique=True)
    named = st.fixed_dictionaries({"steps": steps}, optional={"ranks": ranks})
    return st.none() | steps | named | sections(steps=st.none(), ranks=st.just("all"))


def json_like(*, finite: bool = True) -> st.SearchStrategy[Any]:
    """Anything that a JSON file may hold, lone surrogates included; with `finite=False` also NaN and infinities."""
    texts = st.text(st.characters(exclude_categories=()), max_size=8)
    plain = st.none() | st.booleans() | st.integers() | texts
    plain |= st.floats(allow_nan=not finite, allow_infinity=not finite)
    return st.recursive(
        plain,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
        max_leaves=4,
    )


ANYTHING = json_like(finite=False)
WORDS = [
    "gpipe",
    "1f1b",
    "zb-v",
    "interleaved",
    "full",
    "selective",
    "fp16",
    "auto",
    "fill",
    "sgd",
    "constant",
]
VALUES = st.integers(-1, 9) | st.sampled_from(WORDS) | st.lists(st.integers(0, 3), max_size=3) | ANYTHING
STRAYS = st.dictionaries(st.sampled_from(["degree", "pipelin", "steps", "x.y", ""]), VALUES, max_size=1)


def almost(section: type[Section]) -> st.SearchStrategy[dict[str, Any]]:
    """Mappings with the keys of `section` and values that may do or not, down to the sections inside it."""
    inner = section.sections()
    known = {name: almost(inner[name]) | VALUES if name in inner else VALUES for name in section.model_fields}
    return st.builds(dict.__or__, STRAYS, sections(**known))


VALID = {Distribution: distributions(), Training: trainings(), Job: jobs()}
FUZZED = {
    document: almost(document) | ANYTHING.filter(lambda value: not isinstance(value, str))
    for document in VALID
}
