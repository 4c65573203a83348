"""Questions of the built-in tasks as calibration samples: images and a .jsonl that `--images` takes, without answers.

python benchmarks/calibration_questions.py FOLDER [COUNT]

They are of the calibration split, which shares none with the test. Tables of docs/results.md calibrate with "Describe
this image." unless they say otherwise.
"""

import json
import sys
from pathlib import Path

from spectrim.demo.tasks import TASKS, questions


def main() -> None:
    """Write COUNT questions (189 unless told), as many of each task as that gives, and rounded up."""
    folder, count = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 189
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for task in TASKS:
        for number, found in enumerate(questions(task, "calibration", -(-count // len(TASKS)))):
            found.image.save(folder / f"{task}-{number}.png")
            rows.append({"image": f"{task}-{number}.png", "question": found.question})
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
