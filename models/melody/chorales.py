"""Read the soprano melodies of the Bach chorales that music21 carries, and write `chorales.json`.

`train.py` reads that file, so that music21, which takes a minute for the scores, is only needed to make it again.
Each melody is moved to C major or A minor by its key signature, its lengths are counted in sixteenths, tied notes are
joined, and rests before its first note are left out. Many tunes were set several times: melodies with much in common
are one family, so that a tune held out is not trained on in another setting.
"""

import itertools
import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from music21 import corpus, key, stream

LOWEST, HIGHEST = 57, 81
"""The range of pitches that is kept, as MIDI numbers: A3 to A5."""
DURATIONS = (1, 2, 3, 4, 6, 8, 12, 16, 24)
"""The lengths that are kept, in sixteenths; a quarter is 4."""
MIN_NOTES, MAX_NOTES = 16, 96
FAMILY_STEPS = 6
FAMILY_SHARE = 0.3
"""Two melodies are one family if they share this part of their runs of `FAMILY_STEPS` intervals."""
REST = 0

Notes = list[tuple[int, int]]
"""MIDI number, or `REST`, and length in sixteenths."""


class Melody(NamedTuple):
    """A soprano line; `name` is the score's in the Bach-Werke-Verzeichnis."""

    name: str
    notes: Notes


def read_notes(part: stream.Part) -> Notes | None:
    """Return the part's notes in C major or A minor, or None if they are beyond range, lengths or size kept."""
    flat = part.flatten()
    signature = flat.getElementsByClass(key.KeySignature).first()
    shift = (-7 * (signature.sharps if signature else 0) + 5) % 12 - 5
    notes: Notes = []
    for element in flat.notesAndRests:
        sixteenths = Fraction(element.duration.quarterLength) * 4
        if sixteenths == 0:  # an ornament
            continue
        if sixteenths.denominator != 1 or element.isChord:
            return None
        if element.isNote and element.tie is not None and element.tie.type != "start" and notes:
            notes[-1] = (notes[-1][0], notes[-1][1] + int(sixteenths))
        elif element.isNote or notes:
            notes.append((element.pitch.midi + shift if element.isNote else REST, int(sixteenths)))
    is_kept = all((pitch == REST or LOWEST <= pitch <= HIGHEST) and length in DURATIONS for pitch, length in notes)
    return notes if is_kept and MIN_NOTES <= len(notes) <= MAX_NOTES else None


def read_melodies() -> Iterator[Melody]:
    """Yield every soprano line of the corpus that is kept."""
    for path in sorted(corpus.getComposer("bach", fileExtensions=("mxl",))):
        for part in corpus.parse(path).parts:
            if str(part.partName).strip().lower().startswith("sopran"):
                if notes := read_notes(part):
                    yield Melody(path.stem, notes)
                break


def find_families(melodies: list[Melody]) -> list[int]:
    """Return a number for each melody, the same for those that have `FAMILY_SHARE` of the shorter one in common."""
    runs = []
    for melody in melodies:
        pitches = [pitch for pitch, _ in melody.notes]
        steps = [after - before for before, after in itertools.pairwise(pitches)]
        runs.append({tuple(steps[at : at + FAMILY_STEPS]) for at in range(len(steps) - FAMILY_STEPS + 1)})
    families = list(range(len(melodies)))
    for one, ours in enumerate(runs):
        for other, theirs in enumerate(runs[:one]):
            if len(ours & theirs) >= FAMILY_SHARE * min(len(ours), len(theirs)):
                old, new = families[one], families[other]
                families = [new if family == old else family for family in families]
    return families


def main() -> None:
    """Write `chorales.json` next to this script: one melody a line."""
    melodies = list(read_melodies())
    families = find_families(melodies)
    lines = [
        json.dumps({"name": melody.name, "family": family, "notes": melody.notes}, separators=(",", ":"))
        for melody, family in zip(melodies, families, strict=True)
    ]
    text = "[\n" + ",\n".join(lines) + "\n]\n"
    (Path(__file__).resolve().parent / "chorales.json").write_text(text, encoding="utf-8")
    print(f"{len(melodies)} melodies of {len(set(families))} families")


if __name__ == "__main__":
    main()
