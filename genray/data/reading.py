"""What reading a data set shows to a user: how far it is, and what was left out or changed."""

import time
from collections import Counter
from collections.abc import Iterable

_NAMED = 5  # broken images that a note names
_SHOWN_AFTER_S = 1.0  # what is read faster leaves no bar behind


class Reading:
    """Counts images while they are read, and remarks on them.

    Args:
        progress: a `Progress` of `genray.recording`, or None to show nothing.

    Attributes:
        broken: part -> files of images that are left out because they cannot be decoded.
    """

    def __init__(self, progress=None):
        self._progress, self._remarks, self._left_out = progress, Counter(), Counter()
        self._said: list[str] = []
        self.broken: dict[str, list[str]] = {}
        self._name, self._total, self._done, self._began = "", 0, 0, None

    def begin(self, name: str, total: int):
        """Images of one kind ("train") come now."""
        self.end()
        self._name, self._total, self._done, self._began = name, total, 0, time.monotonic()

    def count(self, images: int):
        """So many more are read."""
        self._done += images
        if self._progress is None or self._began is None:
            return
        if self._name and time.monotonic() - self._began > _SHOWN_AFTER_S:
            self._progress.phase(f"reading {self._name} images", self._total, unit="images")
            self._name = ""
        if not self._name:
            self._progress.steps(self._done)

    def end(self):
        if self._progress is not None:
            self._progress.close()

    def say(self, note: str):
        """Adds a line, if there is something to say."""
        self._said += [note] * bool(note)

    def remark(self, remarks: Iterable[str]):
        """What was done to an image to read it ("turned upright as ..."), in words that follow a number of images."""
        self._remarks.update(remarks)

    def leave_out(self, kind: str):
        """Something is not read: "dead link(s)", ".txt file(s)", with (s) where several of them have an s."""
        self._left_out[kind] += 1

    def leave_out_broken(self, part: str, broken: list, folder: str = ""):
        """(index, file) of images of a part in a folder that cannot be decoded."""
        if broken:
            self.broken[part] = [name.removeprefix(folder).lstrip("/") for _, name in broken]
            some = ", ".join(name for _, name in broken[:_NAMED]) + ", ..." * (len(broken) > _NAMED)
            self._said.append(f"left out: {len(broken)} broken {part} image{'s' * (len(broken) > 1)} ({some})")

    @property
    def notes(self) -> tuple[str, ...]:
        """One line for each remark, one for all that is left out, and all that was said."""
        lines = [f"{count} image{'s' * (count > 1)} {remark}" for remark, count in sorted(self._remarks.items())]
        things = [f"{count} {kind.replace('(s)', 's' * (count > 1))}" for kind, count in sorted(self._left_out.items())]
        return (*lines, *([f"left out: {', '.join(things)}"] if things else []), *self._said)

    def report(self):
        """Says the notes."""
        for note in self.notes if self._progress is not None else ():
            self._progress.say(f"data: {note}")
