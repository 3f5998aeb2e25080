"""What the stored values of a DICOM frame mean (PS3.3): the modality's slope and intercept or table, then a window or a table of the values
of interest, and padding. A frame of an enhanced object has its own, in functional groups; else those of the whole file count.
"""

from typing import Any

import numpy as np

from ssl_locat.errors import CorruptSample

Window = str | tuple[float, float] | None  # "file": the first that it holds; (centre, width); None: values as they are


def modality_values(pixels: np.ndarray, dataset: Any, frame: int) -> np.ndarray:
    """Stored values [H, W] -> those of the modality (C.11.1), float32: HU of a CT, Gy of a dose, optical density of a scanned film."""
    found = _group(dataset, frame, "PixelValueTransformationSequence") or dataset
    if tables := found.get("ModalityLUTSequence"):
        return looked_up(pixels, tables[0], dataset)[0]
    slope, intercept = (float(found.get(name, default)) for name, default in (("RescaleSlope", 1), ("RescaleIntercept", 0)))
    slope *= float(dataset.get("DoseGridScaling", 1))
    if not (np.isfinite(slope) and np.isfinite(intercept)) or slope == 0:
        raise CorruptSample(f"a rescale slope of {slope:g} and intercept of {intercept:g}")
    # 64 bits on the way: an intercept may be large and the slope small
    return (pixels * slope + intercept).astype(np.float32)


def of_interest(values: np.ndarray, dataset: Any, frame: int, window: str | tuple[float, float]) -> np.ndarray:
    """Values of the modality -> 0..1 by the given window; by "file" after the first table that the file holds, else its first window (C.11.2)."""
    if not isinstance(window, str):
        return windowed(values, *window)
    found = _group(dataset, frame, "FrameVOILUTSequence") or dataset
    if tables := found.get("VOILUTSequence"):  # a table before a window, as pydicom has it: who wrote one meant it
        curve, bits = looked_up(values, tables[0], dataset)
        return curve / np.float32(2**bits - 1)
    return windowed(values, *_window(found))


def windowed(values: np.ndarray, centre: float, width: float, function: str = "LINEAR") -> np.ndarray:
    """Values -> 0..1 by the standard's LINEAR, LINEAR_EXACT or SIGMOID."""
    if function == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (values - centre) / width))
    if function == "LINEAR_EXACT":
        return np.clip((values - centre) / width + 0.5, 0, 1)
    # a width of 1 is a threshold
    return np.clip((values - (centre - 0.5)) / max(width - 1, 1e-6) + 0.5, 0, 1)


def looked_up(values: np.ndarray, table: Any, dataset: Any) -> tuple[np.ndarray, int]:
    """(what the table has for each value, float32; bits of an entry). Below its first value it has the first entry, above its last the last."""
    descriptor, data = [int(number) for number in table.LUTDescriptor], table.LUTData
    count, first, bits = descriptor[0] or 1 << 16, descriptor[1], descriptor[2]
    # its own VR may be unsigned where the values are signed (C.11.1.1)
    if first >= 1 << 15 and int(dataset.get("PixelRepresentation", 0)):
        first -= 1 << 16
    if not 8 <= bits <= 16:
        raise CorruptSample(f"a table of {bits} bits an entry; expected 8 to 16")
    if isinstance(data, bytes):
        order = "<" if getattr(dataset, "original_encoding", (None, True))[1] is not False else ">"
        packed = bits == 8 and len(data) < 2 * count  # two entries a word
        data = np.frombuffer(data, np.uint8 if packed else f"{order}u2")
    entries = np.asarray(data, np.float32).reshape(-1)
    if len(entries) < count:
        raise CorruptSample(f"a table of {len(entries)} entries that claims {count}")
    places = np.clip(np.rint(values).astype(np.int64) - first, 0, count - 1)
    return entries[places], bits


def padding(dataset: Any, pixels: np.ndarray) -> np.ndarray | None:
    """bool [H, W]: what lies outside the scanner's field of view."""
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return None
    # stored before the sign was known to some writers: the same bits are meant
    value, other = int(value), int(dataset.get("PixelPaddingRangeLimit", value))
    bits = int(dataset.BitsAllocated)
    if int(dataset.get("PixelRepresentation", 0)):
        value, other = (number - (1 << bits) if number >= 1 << (bits - 1) else number for number in (value, other))
    return (pixels >= min(value, other)) & (pixels <= max(value, other))


def _window(found: Any) -> tuple[float, float, str]:
    """(centre, width, function): the first that is named."""
    given = [found.get(name) for name in ("WindowCenter", "WindowWidth")]
    if any(value is None or value == "" for value in given):
        raise CorruptSample(
            "no window in the file (WindowCenter, WindowWidth, VOILUTSequence): give one as data.channels.window: [CENTRE, WIDTH]"
        )
    first = [float(value[0] if hasattr(value, "__len__") and not isinstance(value, str) else value) for value in given]
    function = str(found.get("VOILUTFunction", "LINEAR") or "LINEAR")
    if first[1] < (1 if function == "LINEAR" else 1e-6) or function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        raise CorruptSample(f"a window of width {first[1]:g} and function {function}")
    return first[0], first[1], function


def _group(dataset: Any, frame: int, sequence: str) -> Any:
    """The item of an enhanced object's functional groups (C.7.6.16) that counts for this frame; None where there is none."""
    own = dataset.get("PerFrameFunctionalGroupsSequence") or []
    shared = dataset.get("SharedFunctionalGroupsSequence") or []
    for groups in (*own[frame : frame + 1], *shared[:1]):
        if items := groups.get(sequence):
            return items[0]
    return None
