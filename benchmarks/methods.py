"""Which way of learning makes the best agent: each begins with the same `sft` cycle, and goes on equally long.

    python -m benchmarks.methods [--worlds order_desk] [--methods 'sft continued;rft + sft'] [--demonstrations 4,8]
    python -m benchmarks.methods --report

A run is one method, seed and number of demonstrations in one world: three cycles of as many gradient steps on equally
many trajectories, the first of them `sft` for every method; its success is measured at the end, on held-out tasks.
What a method takes beside the demonstrations, `benchmarks/recipes.py` says and the table repeats. Seconds are CPU
seconds of one thread, measuring left out.

Finished runs are rows of a file and not run again; several processes may fill it. `--report` prints the tables of what
is there: means over seeds, and what each method gains over the control, paired by seed; "learner" is the CPU
without own episodes, which a server's users play anyway, of the runs that noted it.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import tempfile
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.figures import counts, each_of, from_to, interval
from benchmarks.method_runs import AXES, Run, Scene, Stage
from benchmarks.recipes import CONTROL, DEFAULT, METHODS
from benchmarks.students import NoStudent, student
from policies.novice.build import NOVICE_PATH

RESULTS = Path("benchmarks/results/methods.json")

# ------------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True, slots=True)
class Row:
    """A finished run."""

    method: str
    world: str
    student: str
    seed: int
    demonstrations: int
    axis: str | None
    """None: the plain setting."""
    success_t1: float
    """%, at temperature 1."""
    success_greedy: float | None
    """None: it was not tried so."""
    cpu_seconds: float
    """Of all cycles, measuring left out."""
    is_default: bool
    """The learner's default recipe."""
    tasks: int | None = None
    """How many were tried; None: the run did not note it."""
    episodes_seconds: float | None = None
    """Of the CPU seconds, playing own episodes, which a server's users do anyway; None: not noted."""

    @property
    def cell(self) -> tuple[str, str, int, int, str | None]:
        return self.world, self.student, self.seed, self.demonstrations, self.axis

    @property
    def key(self) -> tuple[str, str, str, int, int, str | None]:
        return self.method, *self.cell


class Rows:
    """The file of finished runs: a list of rows, sorted, written anew with each one."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> list[Row]:
        """What is there now."""
        return [Row(**row) for row in json.loads(self._path.read_text("utf-8"))] if self._path.exists() else []

    def add(self, *rows: Row, instead_of: Callable[[Row], Hashable] = lambda row: row.key) -> None:
        """Beside what other processes have added, instead of rows for which `instead_of` is the same."""
        with self._locked():
            replaced = {instead_of(row) for row in rows}
            held = [each for each in self.read() if instead_of(each) not in replaced]
            ordered = sorted([*held, *rows], key=lambda each: json.dumps(each.key))
            text = ",\n".join(json.dumps(asdict(each)) for each in ordered)
            half_written = self._path.with_suffix(".part")
            half_written.write_text(f"[\n{text}\n]\n", "utf-8")
            half_written.replace(self._path)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with (Path(tempfile.gettempdir()) / "stepagent-methods.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


# ------------------------------------------------------------------------------------------------- runs


def base_of(world: str) -> tuple[str, Path]:
    """The world's student: its name in the table, and its folder, which is made where it is missing (minutes)."""
    if world == "order_desk":
        return "novice", NOVICE_PATH
    return "student", student(world)


def scenes_of(options: argparse.Namespace) -> Iterator[Scene]:
    """What is asked for, one after the other."""
    for world in options.worlds.split(","):
        student, base = (options.model.name, options.model) if options.model else base_of(world)
        for axis in options.axes:
            for number in options.demonstrations:
                for seed in options.seeds:
                    yield Scene(
                        world, student, base, seed, number, AXES[axis or None],
                        num_tasks=options.tasks, device=options.device,
                    )  # fmt: skip


def run_scene(rows: Rows, scene: Scene, methods: Sequence[str]) -> None:
    """Those of the methods that the rows do not have yet. Ends the process where they were tried on other tasks."""
    place = scene.world, scene.student, scene.seed, scene.demonstrations, scene.axis.name
    finished = {row.key: row for row in rows.read()}
    of_scene = [row for row in finished.values() if row.cell[:2] + row.cell[3:] == place[:2] + place[3:]]
    if others := {row.tasks for row in of_scene} - {None, scene.num_tasks}:
        raise SystemExit(
            f"runs of {place} were tried on {others.pop()} tasks, not {scene.num_tasks}: take --results FILE"
        )
    missing = [name for name in methods if (name, *place) not in finished]
    if not missing:
        return
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(scene, Path(folder))
        for name in missing:
            result = Run(stage, name, METHODS[name]).result()
            rows.add(
                Row(
                    name,
                    *place,
                    round(result.success_t1, 2),
                    round(result.success_greedy, 2),
                    round(result.cpu_seconds, 2),
                    name == DEFAULT,
                    scene.num_tasks,
                    round(result.episodes_seconds, 2),
                )
            )
            notes = f" ({result.notes[0]})" if result.notes else ""
            print(
                f"{place}  {name}: T=1 {result.success_t1:.1f}, greedy {result.success_greedy:.1f}, "
                f"{result.cpu_seconds:.1f} CPU s, of it {result.episodes_seconds:.1f} own episodes{notes}",
                flush=True,
            )


# ------------------------------------------------------------------------------------------------ table


def report(rows: Sequence[Row]) -> None:
    """Print a table for each world, student, axis and number of demonstrations."""
    scenes = dict.fromkeys((row.world, row.student, row.axis or "plain", row.demonstrations) for row in rows)
    for scene in sorted(scenes):
        there = [row for row in rows if (row.world, row.student, row.axis or "plain", row.demonstrations) == scene]
        print(f"\n{', '.join(map(str, scene))} demonstrations:\n\n{markdown(scene_table(there))}")


def scene_table(rows: Sequence[Row]) -> list[list[str]]:
    """A row for each method, the best first."""
    by_method = {name: {row.seed: row for row in rows if row.method == name} for name in METHODS}
    control = by_method[CONTROL]
    table = [["method", "takes", "T=1", "less control's", "greedy", "less control's", "CPU s", "learner", "seeds"]]
    found = [(name, by_seed) for name, by_seed in by_method.items() if by_seed]
    for name, by_seed in sorted(found, key=lambda each: -fmean(row.success_t1 for row in each[1].values())):
        paired = [(row, control[seed]) for seed, row in by_seed.items() if seed in control and name != CONTROL]
        table.append(
            [
                name,
                ", ".join(METHODS[name].takes) or "-",
                _rate([row.success_t1 for row in by_seed.values()]),
                _gain([one.success_t1 - other.success_t1 for one, other in paired]),
                _rate(_known(row.success_greedy for row in by_seed.values())),
                _gain(_known(_less(one.success_greedy, other.success_greedy) for one, other in paired)),
                f"{fmean(row.cpu_seconds for row in by_seed.values()):.1f}",
                _learner_seconds(by_seed.values()),
                str(len(by_seed)),
            ]
        )
    return table


def _learner_seconds(rows: Iterable[Row]) -> str:
    found = [row.cpu_seconds - row.episodes_seconds for row in rows if row.episodes_seconds is not None]
    return f"{fmean(found):.1f}" if found else ""


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _less(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _rate(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean, half = interval(values)
    return f"{mean:.1f} ± {half:.1f}" if len(values) > 1 else f"{mean:.1f}"


def _gain(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean, half = interval(values)
    return f"{mean:+.1f} ± {half:.1f}" if len(values) > 1 else f"{mean:+.1f}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The rows as a table of RESULTS.md; the first is its heading. Reads well in a terminal too."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--worlds", default="order_desk", help="which, with commas (default order_desk)")
    parser.add_argument(
        "--methods", type=each_of(METHODS, ";"), default=";".join(METHODS), help="which, with semicolons (default: all)"
    )
    parser.add_argument("--demonstrations", type=counts, default="4,8", help="how many, with commas (default 4,8)")
    parser.add_argument(
        "--axes",
        type=each_of([name or "" for name in AXES], ";"),
        default="",
        help="what is made harder, with semicolons (default: nothing)",
    )
    parser.add_argument("--seeds", type=from_to, default="1-5", help="from-to (default 1-5)")
    parser.add_argument("--tasks", type=int, default=200, help="tasks, each tried greedy and at T=1 (default 200)")
    parser.add_argument("--model", type=Path, help="a real model's folder, instead of the worlds' small students")
    parser.add_argument("--device", default="cpu", help="where the policy is sampled and trained (default cpu)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file of finished runs")
    parser.add_argument("--report", action="store_true", help="print the tables of what is there")
    options = parser.parse_args()
    rows = Rows(options.results)
    if options.report:
        report(rows.read())
        return
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    try:
        for scene in scenes_of(options):
            run_scene(rows, scene, options.methods)
    except NoStudent as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
