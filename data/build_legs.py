"""Make data/legs.csv with reasoning-gym 0.1.25 (Apache-2.0), which is not among this project's
dependencies:

pip install reasoning-gym==0.1.25 && python data/build_legs.py
"""

import csv
from pathlib import Path

import reasoning_gym

SIZES = {1: 3000, 2: 9000}  # drawn; repeated questions are dropped
LARGEST = 12  # animals of a kind


def main() -> None:
    rows, seen = [], set()
    for kinds, size in SIZES.items():
        drawn = reasoning_gym.create_dataset(
            "leg_counting",
            size=size,
            seed=kinds,
            min_animals=kinds,
            max_animals=kinds,
            max_instances=LARGEST,
        )
        for item in drawn:
            question = item["question"].strip().rpartition("Now, ")[2]
            prompt = f"{question[0].upper()}{question[1:]} Answer:"
            if prompt not in seen:
                seen.add(prompt)
                rows.append((prompt, item["answer"], "|".join(sorted(item["metadata"]["animals"]))))
    with (Path(__file__).parent / "legs.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["prompt", "answer", "animals"])
        writer.writerows(rows)


if __name__ == "__main__":
    main()
