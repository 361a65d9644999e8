"""Formats of import files x records: right, refused as they should be with the reason, wrong. Wrong must be 0.

    python -m benchmarks.import_files

Counts the records of tests/import_cases and tests/import_kinds, each against what it must become. Exit code 1 where one
is wrong.
"""

from __future__ import annotations

from collections import Counter, defaultdict

from tests.import_expectations import all_cases, read_file, verdict
from tests.import_kinds_told import all_kinds


def main() -> int:
    table: dict[str, Counter[str]] = defaultdict(Counter)
    wrong = []
    for case in all_cases():
        reads = read_file(case.file)
        told = verdict(case, reads[case.number - 1] if case.number <= len(reads) else None)
        table[case.format][told.partition(":")[0]] += 1
        if told.startswith("wrong"):
            wrong.append(f"{case.file} record {case.number} is {told}")
    for kind in all_kinds():
        for told in kind.verdicts():
            table[kind.format][told.partition(":")[0]] += 1
            if told.startswith("wrong"):
                wrong.append(f"{kind.format}, {kind.name}, is {told}")
    columns = ("right", "refused", "wrong")
    print(f"{'format':<24}{'records':>8}" + "".join(f"{name:>9}" for name in columns))
    for name, counts in sorted(table.items(), key=lambda row: row[0].lower()):
        print(f"{name:<24}{counts.total():>8}" + "".join(f"{counts[column]:>9}" for column in columns))
    whole = sum(table.values(), Counter())
    print(f"{'all':<24}{whole.total():>8}" + "".join(f"{whole[column]:>9}" for column in columns))
    print("\n".join(wrong), end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
