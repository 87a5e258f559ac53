"""Whether back attention gains: the checks that claims C8 and N1 share."""

from collections.abc import Sequence

import pandas as pd

from companion.report.verdicts import Effect, claim, named, points, strictest


def gain_claim(key: str, table: pd.DataFrame, controls: Sequence[str], note: str = "") -> dict:
    """A claim that back attention gains; table: `results.difference_table` of it; note: more words.

    One check per dataset: ahead of zero-shot. One for few-shot and one per control, over all
    datasets: ahead of worked examples, and of an arm trained on the same questions. Each with its
    whole interval. The paper's comparison is zero-shot over all datasets; the strictest control is
    the trained arm that does best there. A control that was not tried on all datasets is
    reported and not checked. Raises ValueError when the table has no row for one of them.
    """
    missing = sorted({"zero-shot", "few-shot", *controls} - set(table["other"]))
    if missing:
        raise ValueError(f"There is no comparison with {missing[0]!r}.")
    untrained = table[(table["other"] == "zero-shot") & (table["dataset"] != "all")]
    over = "all" if (table["dataset"] == "all").any() else untrained["dataset"].iloc[0]
    trained = table[(table["dataset"] == over) & table["other"].isin(["few-shot", *controls])]
    partial = table[table["other"].isin({*controls} - {*trained["other"]})]
    partial = partial.groupby("other").tail(1)
    gains = ", ".join(f"{row['dataset']} {points(row)}" for _, row in untrained.iterrows())
    ahead = ", ".join(f"{row['other']} {points(row)}" for _, row in trained.iterrows())
    some = "".join(
        f"; on {row['dataset']} less {row['other']} {points(row)}" for _, row in partial.iterrows()
    )
    words = f"less zero-shot, points: {gains}; over all datasets less {ahead}{some}{note}"
    whole = table[(table["dataset"] == over) & (table["other"] == "zero-shot")].iloc[0]
    checks = {
        **named(untrained, untrained["low"] > 0, "dataset"),
        **named(trained, trained["low"] > 0),
    }
    rivals = trained[trained["other"] != "few-shot"]
    control = strictest(rivals) if len(rivals) else None
    return claim(key, words, checks, Effect.of("less zero-shot", whole), control)
