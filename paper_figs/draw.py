"""`qlm figures`: what is missing is run, every figure drawn, and a gallery page written."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from paper_figs import style
from paper_figs.figure import Entry, MissingInputError, Source
from paper_figs.published import published
from paper_figs.registry import find
from runners import experiment, files
from runners.experiment_config import FiguresOptions
from runners.progress import CountedProgress
from runners.provenance import environment, note_command

GALLERY = "gallery.md"


def draw_figures(options: FiguresOptions) -> None:
    """Draw figures to ``options.out`` as NAME.png and NAME.pdf, with all captions in ``gallery.md``.

    A figure whose input no command here makes by itself is told in the gallery as missing when all are drawn, and an
    error when it was named.

    Raises:
        ConfigError: there is no figure of a name.
        CommandFailed: rows are missing or wrong, or episodes failed.
        CommandInterrupted: Ctrl-C; the same command goes on.
    """
    entries = find(options.names)
    source = Source(options)
    out = Path(options.out)
    begin_s = time.perf_counter()
    missing: dict[str, str] = {}
    for entry in entries:
        try:
            _check_inputs(entry, source)
        except MissingInputError as error:
            if options.names is not None:
                raise
            missing[entry.name] = str(error)
    drawable = [entry for entry in entries if entry.name not in missing]
    if options.simulate:
        _simulate(drawable, source)
    sections = {}
    with CountedProgress("figures", len(entries)) as progress:
        for entry in entries:
            if entry.name not in missing:
                try:
                    sections[entry.name] = _draw(entry, source, out)
                except MissingInputError as error:
                    if options.names is not None:
                        raise
                    missing[entry.name] = str(error)
            progress.advance(f"{entry.name}: not drawn, {missing[entry.name]}" if entry.name in missing else entry.name)
    wall_s = time.perf_counter() - begin_s
    files.write_text(out / GALLERY, _gallery(entries, sections, missing, options, wall_s))
    note_command(out)
    print(f"{len(sections)} figures and {GALLERY} are in {out}", file=sys.stderr)


def _check_inputs(entry: Entry, source: Source) -> None:
    """Some figures need files that nobody can make here, and can tell before anything is run."""
    check = getattr(entry.module, "check_inputs", None)
    if check is not None:
        check(source)


def _simulate(entries: list[Entry], source: Source) -> None:
    names = dict.fromkeys(name for entry in entries for name in entry.module.EXPERIMENTS)
    wanted = [episode for name in names for episode in experiment.episodes(source.experiment(name))]
    if wanted:
        experiment.run_missing(wanted, source.folder, source.options.workers)


def _draw(entry: Entry, source: Source, out: Path) -> str:
    """Draws one figure; returns its section of the gallery."""
    module = entry.module
    data = module.data(source)
    style.save(module.plot(data), out / entry.name)
    table = getattr(module, "table", None)
    told = f"\n{table(data, source)}" if table is not None else ""
    return f"![{entry.title}]({entry.name}.png)\n\n{module.caption(data, source)}\n{told}"


def _gallery(
    entries: list[Entry], sections: dict[str, str], missing: dict[str, str], options: FiguresOptions, wall_s: float
) -> str:
    machine = environment()
    command = " ".join(["qlm figures", *(options.names or ()), *(["--quick"] if options.quick else [])])
    lines = [
        "# Gallery",
        "",
        f"Drawn by `{command}` in {wall_s:,.0f} s (rows that an earlier run had left are not run again) on "
        f"{machine['cores']} cores of {machine['processor']}; version {machine['qlm_env']}, code "
        f"{machine['code_version']}.",
        "",
    ]
    if options.quick:
        lines += ["The quick form: fewer seeds, points and requests than `qlm figures`, so intervals are wide.", ""]
    lines += [f"The paper's own numbers, where they are drawn: {published().source}.", ""]
    for entry in entries:
        number = f"{entry.number}. " if entry.number != "0" else ""
        body = sections.get(entry.name, f"*Not drawn: {missing.get(entry.name, '')}.*\n")
        lines += [f"## {number}{entry.title}", "", body]
    return "\n".join(lines)
