"""To be deleted once `backattn.adapters.arms` and `companion.questions.datasets` have records.

Then Arm, ARMS, UNTRAINED are imported from the first and DATASETS from the second.
"""

from dataclasses import dataclass

from backattn.adapters import arms
from companion.questions import datasets

if hasattr(arms, "Arm"):
    Arm, ARMS, UNTRAINED = arms.Arm, arms.ARMS, arms.UNTRAINED
else:

    @dataclass(frozen=True)
    class Arm:
        name: str
        about: str
        make: object
        colour: str
        marker: str
        rates: tuple[float, ...] = (2.5e-4, 1e-3, 4e-3)
        two_passes: bool = False
        trains: str = "above"
        several_sources: bool = False
        chooses_memory: bool = False

    UNTRAINED = {
        "zero-shot": Arm("zero-shot", "the model as it is", None, "#bfbfbf", "x", ()),
        "few-shot": Arm("few-shot", "with worked examples first", None, "#808080", "P", ()),
    }
    ARMS = {
        name: Arm(
            name,
            about,
            None,
            *("#949494", "o"),
            (4e-3, 1.6e-2, 6.4e-2) if name == "bias" else Arm.rates,
            name in ("back attention", "loop LoRA"),
            "all" if name == "LoRA q,v" else "above",
        )
        for name, about in arms.ARMS.items()
    }


@dataclass(frozen=True)
class Dataset:
    judge: str
    tuned_on: str
    longer: int
    published: tuple[str, str, str] | None  # file, public home, sha256


class _Datasets:
    def __getitem__(self, name: str) -> Dataset:
        return Dataset(
            "first token" if name in datasets.BY_FIRST_TOKEN else "number",
            name if name in ("two-hop", *datasets.OTHER_PROMPTS) else "1DC",
            {"1DC": 3, "2-digit": 3}.get(name, 1),
            datasets.PUBLISHED.get(name.lower()),
        )


DATASETS = _Datasets()
