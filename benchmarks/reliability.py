"""What is tried for "right or refused", and how it ended: the table of README, from the tests.

    .venv/bin/python benchmarks/reliability.py

A situation is one case of a test: a family of models, what was changed, how it was asked. A test
says what is right there and fails on any other number. Analyses of a changed model count each.
"""

import pandas as pd
import pytest

FILES = (
    "tests/backattn/test_right_or_refused.py",
    "tests/backattn/adapters/test_right_or_refused.py",
    "tests/backattn/models/test_packaged.py",
    "tests/companion/questions/test_facts.py",
    "tests/companion/report/test_tables.py",
    "tests/companion/runs/test_run.py",
    "tests/companion/runner/test_cli.py",
    "tests/test_command.py",
)
KINDS = {  # row of the table -> tests, by the beginning of their names
    "analyses of models with other weights, norms, hooks, adapters in place": (
        "test_what_the_weights_do_not_say", "test_the_same_function", "test_another_norm",
        "test_the_final_norm", "test_quantised", "test_lora", "test_a_layer_steered",
        "test_a_plain_model", "test_a_check_runs",
    ),
    "several texts in one row, other masks, layers replaced": (
        "test_several_texts", "test_layers_that_were_replaced",
    ),
    "special tokens, truncation, tokenizers read otherwise, attention of another kind": (
        "test_the_prompt_is_scored", "test_what_is_left_out", "test_an_eager_pass",
        "test_a_tokenizer_that_cuts", "test_a_conversion_takes",
    ),
    "faults in the middle, copies, gradient checkpointing, guessing ahead": (
        "test_a_fault", "test_gradient_checkpointing", "test_guessing_ahead", "test_threads",
    ),
    "adapters on other base models, saved before, kept by others": (
        "test_an_adapter_knows", "test_adapters_saved", "test_what_others_keep",
        "test_state_dicts",
    ),
    "positions, wishes in the config or in the call, dtypes and modes": (
        "test_a_position", "test_labels_layers", "test_wishes", "test_dtypes", "test_the_state",
    ),
    "cells of tables: digits, dates, missing, a comma too many; what counts as equal": (
        "test_text_of_digits", "test_tables_are_compared", "test_a_table_of_another_shape",
        "test_a_bad_table", "test_text_stays", "test_a_frame_whose",
    ),
    "what counts as made before: other weights, folders, kernels, dtypes": (
        "test_keys_tell", "test_other_weights", "test_a_folder_has", "test_what_changed",
        "test_another_model_dtype", "test_notebooks_run_in_the_runners",
    ),
    "paths, links, terminals, wishes typed wrongly": (
        "test_it_means_the_same", "test_a_terminal", "test_datasets_of_others",
        "test_a_wrong_wish", "test_what_to_type_next", "test_update_is_refused",
    ),
}  # fmt: skip


class Tally:
    """Counts tests by kind, or the analyses that they make, given or refused."""

    def __init__(self):
        self.counts: dict[str, list[int]] = {kind: [0, 0] for kind in KINDS}
        self.inside, self.refused = [0, 0], 0

    def kind(self, name: str) -> str | None:
        return next((k for k, names in KINDS.items() if name.startswith(names)), None)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        module, self.inside = item.module, [0, 0]
        if not hasattr(module, "analyses"):
            return (yield)
        whole = module.analyses

        def counted(*args, **kwargs):
            found = whole(*args, **kwargs)
            refused = sum(values is None for values in found.values())
            self.inside = [self.inside[0] + len(found) - refused, self.inside[1] + refused]
            return found

        module.analyses = counted
        try:
            return (yield)
        finally:
            module.analyses = whole

    def pytest_runtest_logreport(self, report):
        kind = self.kind(report.nodeid.rpartition("::")[2])
        if report.when != "call" or kind is None or report.skipped:
            return
        count, self.refused = self.counts[kind], self.refused + self.inside[1]
        count[report.failed] += 1 if report.failed else max(1, sum(self.inside))


if __name__ == "__main__":
    tally = Tally()
    status = pytest.main(["-q", "-p", "no:cacheprovider", *FILES], plugins=[tally])
    table = pd.DataFrame(tally.counts, index=["right or refused", "wrong"]).T
    table.insert(0, "tried", table.sum(axis=1))
    print(table.rename_axis("kind of situation").to_markdown())
    print(f"Refused analyses of changed models: {tally.refused}")
    raise SystemExit(status)
