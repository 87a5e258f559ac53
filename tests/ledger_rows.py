"""What a row of the ledger says of its checks."""


def held(row: dict) -> str:
    """Whether all, some or none of a row's checks hold."""
    passed, _, count = row["checks"].split(":")[0].split(" ")
    return "all" if passed == count else "some" if passed != "0" else "none"
