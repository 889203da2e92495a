"""One split of a data set, verified once: boxes inside their images, broken images left out, everything odd counted and listed."""
from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from utils.data import cache as label_cache
from utils.data.cache import split_rows
from utils.data.formats import LabelSource, RawLabels, coco_source, voc_source
from utils.data.images import ImageError, check_image
from utils.data.spec import DataSpec
from utils.data.yolo_text import visdrone_source, yolo_source
from utils.errors import UserError
from utils.log import info, warn

_VERSION = 3  # of the rules below; raise it when they change
_MAX_OVERSHOOT = 0.01  # of the image's side
_SAME_ASPECT = 0.98  # ratio of two aspect ratios that rounding may leave
_DUST = 1e-6  # what six decimals lose: cut silently
_SHOWN = 5  # problems printed; check.py lists all


@dataclass(frozen=True)
class ScanReport:
    """What verification found. Boxes count after it."""

    images: int
    boxes: int
    crowds: int
    backgrounds: int  # images without a box
    unlabelled: int  # of the listed images, those without a label file or entry
    broken: int  # images left out
    duplicates: int  # exact copies of a box, left out
    clipped: int  # boxes that overshot the image by up to 1 %
    dropped: int  # boxes that overshot by more, or have no area
    difficult: int  # objects that VOC marks so, left out
    problems: tuple[str, ...]  # "file:line: what", one line each

    def summary(self) -> str:
        odd = {"backgrounds": self.backgrounds, "without labels": self.unlabelled, "broken images": self.broken,
               "duplicate boxes": self.duplicates, "boxes clipped": self.clipped, "boxes dropped": self.dropped,
               "difficult left out": self.difficult, "crowd regions": self.crowds}
        return ", ".join([f"{self.images} images", f"{self.boxes} boxes", *(f"{count} {what}" for what, count in odd.items() if count)])


@dataclass(frozen=True)
class Split:
    """N verified images and their labels."""

    names: tuple[str, ...]
    images: tuple[str, ...]  # paths
    sizes: np.ndarray  # (N, 2) int32 width, height as shown
    boxes: tuple[np.ndarray, ...]  # N of (n, 5) float32: class, cx, cy, w, h, normalised
    crowds: tuple[np.ndarray, ...]  # N of (k, 5) float32: COCO's crowd regions, never trained on, ignored by scoring
    areas: tuple[np.ndarray, ...] | None  # N of (n,) float32 object areas in square pixels, where the format gives them
    crowd_areas: tuple[np.ndarray, ...] | None  # N of (k,)
    image_ids: tuple[int | str, ...]  # for JSON output: COCO's, else the file name's number or the name; never two the same
    category_ids: tuple[int, ...]  # class index -> JSON category id
    report: ScanReport
    fingerprint: str  # of everything above

    def take(self, indices: Sequence[int]) -> Split:
        """The images of these numbers, in this order; the report stays the whole split's."""
        def chosen(values: Sequence[Any] | None) -> tuple[Any, ...] | None:
            return None if values is None else tuple(values[i] for i in indices)

        return replace(
            self, images=chosen(self.images), sizes=self.sizes[list(indices)], boxes=chosen(self.boxes), crowds=chosen(self.crowds),
            areas=chosen(self.areas), crowd_areas=chosen(self.crowd_areas), image_ids=chosen(self.image_ids),
            fingerprint=hashlib.sha256(f"{self.fingerprint} {list(indices)}".encode()).hexdigest())


def load_split(spec: DataSpec, split: str, *, single_cls: bool = False, cache: bool = True, progress: bool = True) -> Split:
    """The verified `split` of a data set, from the cache where nothing changed.

    Args:
        single_cls: all objects become class 0, named "item".
        cache: read and write the cache; the labels are verified anew where False.
        progress: print the summary and the first problems.

    Raises:
        UserError: a missing or empty set, or a label that must be mended.
    """
    source = _open_source(spec, split)
    key = label_cache.fingerprint_files(source.files, _VERSION, spec.format, spec.names)
    file = label_cache.cache_file(spec.root, f"{spec.file.stem}-{split}", key)
    stored = label_cache.load(file) if cache else None
    verified = _unpack(*stored) if stored else None
    if verified is None:
        verified = _verify(spec, split, source.read())
        if cache:
            label_cache.save(file, *_pack(verified))
    if progress:
        _tell(spec, split, verified.report)
    return _as_single_class(verified) if single_cls else verified


def _open_source(spec: DataSpec, split: str) -> LabelSource:
    if split not in spec.splits:
        raise UserError(f"{spec.file}: has no {split}: entry; it has {', '.join(spec.splits)}")
    places = [spec.find(entry) for entry in spec.splits[split]]
    folder = spec.find(spec.images[split]) if split in spec.images else None
    openers: dict[str, Callable[[], LabelSource]] = {
        "yolo": lambda: yolo_source(places, spec.root, spec.names, spec.file),
        "visdrone": lambda: visdrone_source(places, spec.root, spec.names, spec.file),
        "coco": lambda: coco_source(places, folder, spec.names, spec.file),
        "voc": lambda: voc_source(places, folder, spec.names, spec.file),
    }
    return openers[spec.format]()


def _verify(spec: DataSpec, split: str, raw: RawLabels) -> Split:
    if raw.mistakes:
        more = f" (and {len(raw.mistakes) - 1} more such mistakes)" if len(raw.mistakes) > 1 else ""
        raise UserError(f"{raw.mistakes[0]}{more}")
    if not raw.images:
        raise UserError(f"{spec.file}: {split}: no images in {', '.join(str(spec.find(entry)) for entry in spec.splits[split])}")
    if raw.unlabelled == len(raw.images) and split != "test" and any(map(os.path.exists, raw.images)):
        where = "; YOLO labels lie at the same path with the last /images/ as /labels/ and .txt" if spec.format == "yolo" else ""
        raise UserError(f"{spec.file}: {split}: no label file for any of {len(raw.images)} images, the first is {raw.images[0]}{where}")
    problems = list(raw.problems)
    sizes, whole = _check_images(raw.images, problems)
    if not whole.any():
        raise UserError(f"{spec.file}: {split}: none of {len(raw.images)} images can be read; {'; '.join(problems[:1])}")
    crowd = raw.crowd if raw.crowd is not None else np.zeros(len(raw.rows), bool)
    keep = whole[raw.owner]
    frames, areas = None, raw.areas
    if raw.frames is not None:
        labelled_on = np.where(raw.frames > 0, raw.frames, sizes)
        problems += _contradictions(raw.images, labelled_on, sizes, whole)
        frames = labelled_on[raw.owner]
        if areas is not None:
            areas = areas * (sizes / np.maximum(labelled_on, 1)).prod(1)[raw.owner]
    rows, fits, clipped = _fit(raw.rows, frames)
    fresh = ~_repeats(rows, raw.owner * 2 + crowd)
    for row in np.flatnonzero(keep & ~fits):
        problems.append(f"{raw.place(int(row))}: dropped: {_why_dropped(raw.rows[row], None if frames is None else frames[row])}")
    for row in np.flatnonzero(keep & fits & ~fresh):
        problems.append(f"{raw.place(int(row))}: dropped: an exact copy of another box of this image")
    if keep.any() and not (keep & fits).any():
        raise UserError(f"{spec.file}: {split}: every box lies outside its image, the first at {raw.place(0)}; "
                        "are they in pixels? divide by the image's size")

    new_index = np.cumsum(whole) - 1
    kept = keep & fits & fresh
    tables = [_per_image(rows, raw.owner, kept & mask, new_index, int(whole.sum())) for mask in (~crowd, crowd)]
    areas = None if areas is None else [
        _per_image(areas.astype(np.float32), raw.owner, kept & mask, new_index, int(whole.sum())) for mask in (~crowd, crowd)]
    images = [image for image, good in zip(raw.images, whole, strict=True) if good]
    ids = [image for image, good in zip(raw.image_ids, whole, strict=True) if good] if raw.image_ids is not None else _image_ids(images, spec.root)
    report = ScanReport(
        images=len(images), boxes=int((kept & ~crowd).sum()), crowds=int((kept & crowd).sum()), backgrounds=sum(not len(b) for b in tables[0]),
        unlabelled=raw.unlabelled, broken=int((~whole).sum()), duplicates=int((keep & fits & ~fresh).sum()), clipped=int((kept & clipped).sum()),
        dropped=int((keep & ~fits).sum()), difficult=raw.difficult, problems=tuple(problems))
    parts = (raw.names, tuple(images), sizes[whole], *tables, *(areas or (None, None)), tuple(ids), raw.category_ids, report)
    return Split(*parts, _fingerprint(spec.root, *parts[:5]))


def _check_images(images: list[str], problems: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(N, 2) int32 sizes and (N,) bool: which are whole."""
    sizes, whole = np.zeros((len(images), 2), np.int32), np.ones(len(images), bool)
    for n, image in enumerate(images):
        try:
            sizes[n] = check_image(image)
        except ImageError as error:
            problems.append(f"{error}: image left out")
            whole[n] = False
    return sizes, whole


def _contradictions(images: Sequence[str], labelled_on: np.ndarray, sizes: np.ndarray, whole: np.ndarray) -> Iterator[str]:
    """Images that were not labelled as they are shown, and not in another resolution either: most often turned by EXIF, which the tool ignored."""
    crossed = labelled_on.astype(np.int64) * sizes[:, ::-1]
    for n in np.flatnonzero(whole & (crossed.min(1) < _SAME_ASPECT * crossed.max(1))):
        (width, height), (own_width, own_height) = labelled_on[n].astype(int), sizes[n]
        yield (f"{images[n]}: labelled on {width}x{height}, shown as {own_width}x{own_height}: its boxes may be elsewhere "
               "(did the tool ignore how EXIF turns it?)")


def _fit(rows: np.ndarray, frames: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(R, 5) boxes to float32, normalised and cut to the image; which fit (overshoot up to 1 %, an area left); which were visibly cut."""
    boxes = rows.copy()
    if frames is not None:
        boxes[:, 1:] /= np.maximum(np.tile(frames, 2), 1)
    low, high = boxes[:, 1:3] - boxes[:, 3:5] / 2, boxes[:, 1:3] + boxes[:, 3:5] / 2
    overshoot = np.maximum(-low, high - 1).max(1)
    outside = overshoot > 0
    low, high = low[outside].clip(0, 1), high[outside].clip(0, 1)
    boxes[outside, 1:3], boxes[outside, 3:5] = (low + high) / 2, high - low
    fits = (overshoot <= _MAX_OVERSHOOT + _DUST) & (boxes[:, 3:5] > 0).all(1)
    return boxes.astype(np.float32), fits, overshoot > _DUST


def _why_dropped(row: np.ndarray, frame: np.ndarray | None) -> str:
    if (row[3:] <= 0).any():
        return "a box without area"
    centre, size = (row[1:3], row[3:5]) if frame is None else (row[1:3] / frame, row[3:5] / frame)
    overshoot = np.maximum(size / 2 - centre, centre + size / 2 - 1).max()
    return f"lies outside its image by {overshoot:.1%} of the side" if overshoot > _MAX_OVERSHOOT else "no area inside its image"


def _repeats(rows: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """(R,) bool: rows that an earlier row of the same owner equals."""
    repeats = np.zeros(len(rows), bool)
    key = owner.astype(np.uint64) << np.uint64(32) | np.ascontiguousarray(rows[:, 1]).view(np.uint32)
    order = np.argsort(key, kind="stable")
    same = key[order[1:]] == key[order[:-1]]
    suspects = np.unique(np.concatenate((order[1:][same], order[:-1][same])))  # ascending: the first of equals stays
    seen: set[tuple[int, bytes]] = set()
    for n in suspects.tolist():
        row = (int(owner[n]), rows[n].tobytes())
        repeats[n] = row in seen
        seen.add(row)
    return repeats


def _per_image(values: np.ndarray, owner: np.ndarray, mask: np.ndarray, new_index: np.ndarray, images: int) -> tuple[np.ndarray, ...]:
    return split_rows(values[mask], np.bincount(new_index[owner[mask]], minlength=images))


def _image_ids(images: list[str], root: Path) -> list[int | str]:
    """File names' numbers where all have one, else their names; paths below the root where two would be the same. COCO's tools sort them."""
    stems = [os.path.splitext(os.path.basename(image))[0] for image in images]
    for ids in ([int(stem) for stem in stems] if all(map(str.isdecimal, stems)) else stems, stems):
        if len(set(ids)) == len(ids):
            return ids
    return _below(root, images)


def _below(root: Path, images: Sequence[str]) -> list[str]:
    """Paths without the root, so that a moved data set stays the same."""
    start = os.path.join(root, "")
    return [image.removeprefix(start).replace(os.sep, "/") for image in images]


def _fingerprint(root: Path, names: tuple[str, ...], images: tuple[str, ...], sizes: np.ndarray, *tables: tuple[np.ndarray, ...]) -> str:
    """The same on every machine and for every place of the data."""
    digest = hashlib.blake2b(repr((names, _below(root, images))).encode(errors="surrogateescape"), digest_size=16)
    digest.update(sizes.astype("<i4").tobytes())
    for table in tables:
        rows, counts = label_cache.join(table)
        digest.update(counts.astype("<i8").tobytes() + rows.astype("<f4").tobytes())
    return digest.hexdigest()


def _pack(split: Split) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    arrays = {"sizes": split.sizes}
    for name in ("boxes", "crowds"):
        arrays[name], arrays[f"{name}_counts"] = label_cache.join(getattr(split, name))
    for name in ("areas", "crowd_areas"):
        if getattr(split, name) is not None:
            arrays[name] = np.concatenate([np.empty(0, np.float32), *getattr(split, name)])
    plain = {name: getattr(split, name) for name in ("names", "images", "image_ids", "category_ids", "fingerprint")}
    return arrays, {**plain, "report": asdict(split.report)}


def _unpack(arrays: dict[str, np.ndarray], plain: dict[str, Any]) -> Split | None:
    try:
        tables = {name: split_rows(arrays[name], arrays[f"{name}_counts"]) for name in ("boxes", "crowds")}
        areas = {name: split_rows(arrays[name], arrays[f"{of}_counts"]) if name in arrays else None
                 for name, of in (("areas", "boxes"), ("crowd_areas", "crowds"))}
        report = plain.pop("report")
        texts = {name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()}
        return Split(sizes=arrays["sizes"], **tables, **areas, **texts, report=ScanReport(**{**report, "problems": tuple(report["problems"])}))
    except (KeyError, TypeError, ValueError):  # written by something else
        return None


def _tell(spec: DataSpec, split: str, report: ScanReport) -> None:
    info(f"{split}: {report.summary()}")
    for problem in report.problems[:_SHOWN]:
        warn(problem)
    if len(report.problems) > _SHOWN:
        warn(f"{len(report.problems) - _SHOWN} more like these; python -m utils.data.check --data {spec.file.name} lists them")


def _as_single_class(split: Split) -> Split:
    def zeroed(tables: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        return tuple(table * np.array([0, 1, 1, 1, 1], np.float32) for table in tables)

    names = split.names if len(split.names) == 1 else ("item",)
    values = {**split.__dict__, "names": names, "boxes": zeroed(split.boxes), "crowds": zeroed(split.crowds), "category_ids": split.category_ids[:1],
              "fingerprint": f"{split.fingerprint}-single"}
    return Split(**values)
