"""Bundles in, numbered versions and movable labels out, in one folder on any pyarrow filesystem.

    ROOT/NAME/versions/3/                    a bundle, never changed; with its answers to fixed questions
    ROOT/NAME/labels/production/000007.json  the seventh move of the label; the highest number is where it points
    ROOT/NAME/moving.lock                    who moves labels along with a service at the moment

A version is claimed by renaming a complete folder to a number that is free, a move of a label by creating the next
record; neither ever replaces anything, so on a local disk any number of processes may do both at once. A move that
takes a service along takes a while; one process at a time makes such (`moving`). On object stores there must be one
writer at a time.
"""

import contextlib
import functools
import getpass
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal

from elasticrec.artifact.bundle import Bundle, describe, open_bundle
from elasticrec.artifact.claim import ClaimedError, claimed
from elasticrec.artifact.golden import golden_answers, render_golden
from elasticrec.artifact.location import Location, locate, new_folder
from elasticrec.artifact.manifest import GOLDEN, MANIFEST, render
from elasticrec.errors import BundleError, RegistryError, suggestion

LATEST: Final = "latest"  # always the highest version; not a label
DEFAULT_LABEL: Final = "production"

More = Callable[[Bundle], Mapping[str, bytes]]

_RECORD = re.compile(r"(?:\d{6}|[1-9]\d{6,})\.json")  # as `_record` writes it
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_REFERENCE = re.compile(rf"(?P<root>.+)#(?P<name>{_NAME})(?:@(?P<ref>{_NAME}))?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Move:
    """One move of a label."""

    version: str
    action: Literal["set", "rollback"]
    by: str
    reason: str
    at: str  # ISO 8601, UTC
    percent: float | None = None  # of the users (canary) or of the requests (shadow); none for other labels


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """`ROOT#NAME@REF`: a version or label of a model in a registry."""

    root: str
    name: str
    ref: str


class Registry:
    """The versions and labels below one root."""

    def __init__(self, root: str | Path | Location) -> None:
        self.root = locate(root)

    def publish(self, bundle: Bundle | str | Path, name: str, more: More = lambda _: {}) -> str:
        """Copies a bundle into the registry as the next version of `name`; returns the version.

        The copy's manifest carries the registry's name and version, and where it came from in its lineage. Its golden
        answers are made here, unless the bundle has some, so that whoever loads it can check that it still gives them.

        Args:
            more: makes files beside those of the bundle, or in their place, after those were found whole.

        Raises:
            BundleError: the bundle is damaged, or holds no network that answers.
            RegistryError: the name cannot be used.
        """
        _check_name("name", name)
        source = bundle if isinstance(bundle, Bundle) else open_bundle(bundle, verify=False)
        make = functools.cache(lambda: _made(source, more))  # once, whoever else takes a number meanwhile
        while True:
            version = str(max(map(int, self._claimed(name)), default=0) + 1)
            try:
                with new_folder(self.root / name / "versions" / version) as folder:
                    _copy(source, folder, name, version, make)
            except FileExistsError:
                continue  # another publisher took the number
            return version

    def names(self) -> list[str]:
        """Models that have a version."""
        return [name for name in self.root.children() if self.versions(name)]

    def versions(self, name: str) -> list[str]:
        """Versions of `name`, oldest first; empty when it has none."""
        place = self.root / name / "versions"
        return [version for version in self._claimed(name) if (place / version / MANIFEST).exists()]

    def labels(self, name: str) -> dict[str, str]:
        """Version of each label of `name`."""
        labels = (self.root / name / "labels").children()
        return {label: moves[-1].version for label in labels if (moves := self.history(name, label))}

    def history(self, name: str, label: str) -> list[Move]:
        """Every move of a label, oldest first; empty when it was never set.

        Raises:
            RegistryError: a record is damaged or missing.
        """
        place = self.root / name / "labels" / label
        return [_read_move(place / record) for record in _records(place)]

    @contextlib.contextmanager
    def moving(self, name: str, what: str) -> Iterator[None]:
        """For whoever moves labels of `name` along with a service: one block at a time, of all processes.

        `set_label` and `rollback` do not ask for it: each is one step, and whole by itself.

        Raises:
            RegistryError: there is no such model, or another move goes on; says which.
        """
        self._known_versions(name)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(claimed(self.root / name / "moving.lock", what))
            except ClaimedError as error:
                raise RegistryError(
                    f"another move of '{name}' goes on ({error}); wait for its end, then look at the labels"
                ) from None
            yield

    def set_label(
        self, name: str, label: str, version: str, *, by: str = "", reason: str = "", percent: float | None = None
    ) -> Move:
        """Points a label at a version; `percent` says of how much it takes part (`serving/rollout.py`).

        Raises:
            RegistryError: there is no such version, or the label cannot be used.
        """
        check_label(label)
        self._check_version(name, version)
        while True:
            moves = self.history(name, label)
            moved = Move(version=version, action="set", by=by or _user(), reason=reason, at=_now(), percent=percent)
            if self._append(name, label, len(moves), moved):
                return moved

    def rollback(self, name: str, label: str, *, by: str = "", reason: str = "") -> Move:
        """Points a label at the version it had before; again, at the one before that.

        Raises:
            RegistryError: the label has no earlier version, or someone moved it at the same moment.
        """
        moves = self.history(name, label)
        earlier = self._earlier(name, label, moves)
        moved = Move(version=earlier, action="rollback", by=by or _user(), reason=reason, at=_now())
        if not self._append(name, label, len(moves), moved):
            raise RegistryError(f"label '{label}' of '{name}' was moved by someone else just now; look, then try again")
        return moved

    def version_before(self, name: str, label: str) -> str:
        """Where a rollback of the label would go; raises as `rollback`."""
        return self._earlier(name, label, self.history(name, label))

    def _earlier(self, name: str, label: str, moves: Sequence[Move]) -> str:
        if not moves:
            raise self._no_label(name, label)
        earlier = trail(moves)[:-1]
        if not earlier:
            raise RegistryError(f"label '{label}' of '{name}' was never at another version than {moves[-1].version}")
        return earlier[-1]

    def version_of(self, name: str, ref: str) -> str:
        """The version that a label, a version or `latest` names.

        Raises:
            RegistryError: no such name, label or version; says the nearest.
        """
        versions = self._known_versions(name)
        if ref == LATEST:
            return versions[-1]
        if ref.isdigit():
            self._check_version(name, ref)
            return ref
        moves = self.history(name, ref)
        if not moves:
            raise self._no_label(name, ref)
        return moves[-1].version

    def resolve(self, name: str, ref: str = DEFAULT_LABEL) -> str:
        """URI of the bundle that a label, a version or `latest` names; raises as `version_of`."""
        return (self.root / name / "versions" / self.version_of(name, ref)).uri

    def open(self, name: str, ref: str = DEFAULT_LABEL, *, verify: bool = True) -> Bundle:
        """The bundle that a label, a version or `latest` names."""
        return open_bundle(self.root / name / "versions" / self.version_of(name, ref), verify=verify)

    def _append(self, name: str, label: str, count: int, moved: Move) -> bool:
        """Writes move number count + 1; false when somebody else wrote it first."""
        place = self.root / name / "labels" / label
        place.make_folder()
        return (place / _record(count + 1)).claim((json.dumps(asdict(moved)) + "\n").encode())

    def _claimed(self, name: str) -> list[str]:
        """Numbers that are taken, also by a publisher that died on an object store before its manifest."""
        taken = (self.root / name / "versions").children()
        return sorted((version for version in taken if version.isdigit()), key=int)

    def _known_versions(self, name: str) -> list[str]:
        versions = self.versions(name)
        if not versions:
            raise RegistryError(f"registry '{self.root}' has no model '{name}'{suggestion(name, self.names())}")
        return versions

    def _check_version(self, name: str, version: str) -> None:
        known = self._known_versions(name)
        if version not in known:
            raise RegistryError(f"'{name}' has no version {version}; known: {_shorten(known)}")

    def _no_label(self, name: str, label: str) -> RegistryError:
        self._known_versions(name)
        known = [*self.labels(name), LATEST]
        return RegistryError(f"'{name}' has no label '{label}'{suggestion(label, known)}")


def trail(moves: Sequence[Move]) -> list[str]:
    """The versions that a label would go back through, its present one last: a rollback undoes one `set`."""
    stack: list[str] = []
    for move in moves:
        if move.action == "rollback":
            stack.pop()
        elif not stack or stack[-1] != move.version:
            stack.append(move.version)
    return stack


def parse_reference(text: str) -> Reference | None:
    """`ROOT#NAME@REF` or `ROOT#NAME` (its production label); none for anything else, such as a plain path."""
    match = _REFERENCE.fullmatch(text)
    if match is None:
        return None
    return Reference(root=match["root"], name=match["name"], ref=match["ref"] or DEFAULT_LABEL)


def resolve_reference(text: str | Path) -> str:
    """URI of the bundle that `ROOT#NAME@REF` names; a plain path or URI of a bundle is made absolute.

    Raises:
        RegistryError: the registry has no such name, label or version.
        BundleError: there is no bundle at a plain path.
    """
    reference = parse_reference(str(text))
    if reference is not None:
        return Registry(reference.root).resolve(reference.name, reference.ref)
    location = locate(text)
    if not (location / MANIFEST).exists():
        raise BundleError(
            f"'{location}' is not a bundle: it has no {MANIFEST}; give a bundle's folder or REGISTRY#NAME@LABEL"
        )
    return location.uri


def _made(source: Bundle, more: More) -> dict[str, bytes]:
    made = dict(more(source))
    if GOLDEN not in source.manifest.files:
        made[GOLDEN] = render_golden(golden_answers(source.network()))
    return made


def _copy(source: Bundle, folder: Location, name: str, version: str, make: Callable[[], Mapping[str, bytes]]) -> None:
    for file, expected in source.manifest.files.items():
        place = source.location / file
        try:
            with (folder / file).writing() as stream:
                for chunk in place.chunks():
                    stream.write(chunk)
        except FileNotFoundError:
            raise BundleError(f"'{place}' is missing; get the bundle again") from None
        if describe(folder / file) != expected:
            raise BundleError(f"'{place}' is damaged: its sha256 differs; get the bundle again")
    origin = {"uri": source.uri, "name": source.name, "version": source.version}
    lineage = {**source.manifest.lineage, "published_from": origin}
    files = dict(source.manifest.files)
    for file, content in make().items():
        (folder / file).write(content)
        files[file] = describe(folder / file)
    manifest = replace(source.manifest, name=name, version=version, lineage=lineage, files=files)
    (folder / MANIFEST).write(render(manifest))


def _records(place: Location) -> list[str]:
    """Names of a label's records, oldest first; their numbers run from 1 without a gap, so the next is known."""
    while True:
        numbers = sorted(int(name[:-5]) for name in place.children() if _RECORD.fullmatch(name))
        names = [_record(number) for number in numbers]
        gap = next((number for number, found in enumerate(numbers, start=1) if number != found), None)
        if gap is None:
            return names
        # A listing that was made while two records were written may show the later one only; then the earlier is there.
        if not (place / _record(gap)).exists():
            raise RegistryError(f"label record '{place / _record(gap)}' is missing; restore it from a backup")


def _record(number: int) -> str:
    return f"{number:06d}.json"


def _read_move(place: Location) -> Move:
    try:
        return Move(**json.loads(place.read()))
    except (ValueError, TypeError) as error:
        raise RegistryError(f"label record '{place}' is damaged: {error}; restore it from a backup") from None


def _check_name(what: str, name: str) -> None:
    if not re.fullmatch(_NAME, name):
        raise RegistryError(f"{what} '{name}' cannot be used; take letters, digits, '.', '_' and '-'")


def check_label(label: str) -> None:
    """Raises RegistryError for a label that cannot be used."""
    _check_name("label", label)
    if label.isdigit() or label == LATEST:
        raise RegistryError(f"label '{label}' reads as a version; take a word such as '{DEFAULT_LABEL}'")


def _shorten(versions: Sequence[str]) -> str:
    return ", ".join(versions) if len(versions) <= 8 else f"{', '.join(versions[:2])} … {', '.join(versions[-4:])}"


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container without a name for the user id
        return "unknown"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
