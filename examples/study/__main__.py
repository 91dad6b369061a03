"""Measures the study and writes docs/study.md.

    python -m examples.study [--only NAME] [--anew] [--quick] [--render]

Each section's results are kept when it is done, so that a run that was killed goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

from examples.study import document
from examples.study.context import Context
from examples.study.machine import facts_of_run
from examples.study.section import Section
from examples.study.sections import SECTIONS
from examples.study.sizes import FULL, QUICK, Sizes

ROOT = Path(__file__).parent.parent.parent


def main(arguments: list[str] | None = None) -> None:
    """Runs what is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=[], help="these, anew")
    parser.add_argument("--anew", action="store_true", help="forget what was measured before")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: no figure means anything")
    parser.add_argument("--render", action="store_true", help="measure nothing, write the page")
    parser.add_argument("--work", type=Path, help="what was measured (out/study)")
    parser.add_argument("--page", type=Path, help="what is written (docs/study.md)")
    args = parser.parse_args(arguments)
    # A quick run must not overwrite the page.
    work = args.work or ROOT / "out" / ("study-quick" if args.quick else "study")
    page = args.page or (work / "study.md" if args.quick else ROOT / "docs" / "study.md")
    if not args.render:
        names = args.only or list(SECTIONS)
        run(names, QUICK if args.quick else FULL, work, anew=args.anew or bool(args.only))
    sections = saved(work, page.with_suffix(""))
    document.write(sections, page)
    print(f"written to {page}")


def run(names: list[str], sizes: Sizes, work: Path, *, anew: bool) -> None:
    """Measures sections, those that are done already left out."""
    work.mkdir(parents=True, exist_ok=True)
    sections = work / "sections"
    sections.mkdir(exist_ok=True)
    wanted = json.loads(json.dumps(dataclasses.asdict(sizes)))
    context = None
    for name in names:
        path = sections / f"{name}.json"
        if not anew and path.exists() and _load(path).facts["sizes"] == wanted:
            print(f"== {name}: measured already", flush=True)
            continue
        print(f"== {name}", flush=True)
        began = time.perf_counter()
        context = context or Context(sizes, work)
        found = SECTIONS[name](context)
        seconds = time.perf_counter() - began
        fields = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
        section = Section(name=name, **fields, facts=facts_of_run(wanted, seconds))
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps(section.to_dict(), indent=1) + "\n", encoding="utf-8")
        partial.rename(path)
        print(f"   {seconds:.0f} s", flush=True)


def saved(work: Path, folder: Path) -> list[Section]:
    """What was measured here, and else what the page's folder holds, in order."""
    found = []
    for name in SECTIONS:
        places = [work / "sections" / f"{name}.json", folder / f"{name}.json"]
        found += [_load(path) for path in places if path.exists()][:1]
    return found


def _load(path: Path) -> Section:
    return Section.from_dict(json.loads(path.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
