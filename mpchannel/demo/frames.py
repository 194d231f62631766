"""``demo frames``: video frames of 1080p pass through three processes, and are never copied.

    camera   allocates a ``SharedBuffer``, paints the frame into it, and moves it on
    filter   inverts its colours, in place, and moves it on
    checker  compares every pixel with what it must be, drops the frame, and tells the camera, which is never more than
             ``AHEAD`` frames ahead: this is how a source is kept from running away from who works on what it makes

The memory of a frame that was dropped is used for a new one: after the first few frames, none needs fresh pages.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import mpchannel

from .children import Children
from .progress import ProgressLine, bar
from .table import print_table

if TYPE_CHECKING:
    import numpy as np

    Image = np.ndarray[Any, np.dtype[np.uint8]]

FRAMES: Final = 1_000
PLOT: Final = "mpchannel-frames.png"
SHAPE: Final = (1080, 1920, 3)  # rows, columns, red-green-blue: a byte each
SIZE: Final = SHAPE[0] * SHAPE[1] * SHAPE[2]
AHEAD: Final = 4
INTERVAL: Final = 0.1  # seconds between two samples of a process
WARM_UP: Final = 20  # frames, after which everything is in place
ROLES: Final = ("camera", "filter", "checker")


class Frame(NamedTuple):
    number: int
    pixels: mpchannel.SharedBuffer


class Sample(NamedTuple):
    """How far a process is."""

    at: float  # seconds, time.monotonic()
    frames: int
    faults: int  # page faults while it worked on pixels
    memory: int  # bytes; of what is shared, its part (the PSS of proc(5))


Frames = mpchannel.MessagePort[Any, Any]
Reports = mpchannel.MessagePort[Sample, None]


# The three processes


def camera(count: int, out: Frames, checked: Frames, reports: Reports) -> None:
    scene, meter = make_scene(), Meter(reports)
    for number in range(count):
        try:
            if number >= AHEAD:
                checked.recv()
        except mpchannel.PortClosedError:
            break  # nobody checks any more; main is told why by the one who is gone
        pixels = mpchannel.SharedBuffer(SIZE)
        paint(pixels, scene, number, meter)
        out.post_message(Frame(number, pixels), transfer=[pixels])
        meter.count()
    meter.tell()


def work_as_filter(frames: Frames, out: Frames, reports: Reports) -> None:
    meter = Meter(reports)
    for frame in frames:
        invert(frame.pixels, meter)
        out.post_message(frame, transfer=[frame.pixels])
        meter.count()
    meter.tell()


def checker(frames: Frames, checked: Frames, reports: Reports, verdict: Frames) -> None:
    """Posts to *verdict* the numbers of all frames that came, in order, and of those that were not right."""
    right, meter = make_check(), Meter(reports)
    came: list[int] = []
    wrong: list[int] = []
    for frame in frames:
        came.append(frame.number)
        if not right(frame, meter):
            wrong.append(frame.number)
        frame.pixels.close()
        checked.post_message(frame.number)
        meter.count()
    meter.tell()
    verdict.post_message((came, wrong))


# What they do with a frame. A view of a buffer keeps it from moving on, so each lives in a function of its own.


def make_scene() -> Image:
    """A colourful still, which the camera makes brighter from frame to frame."""
    import numpy as np

    rows, columns, colours = (np.arange(length, dtype=np.uint16) for length in SHAPE)
    return (rows[:, None, None] + columns[None, :, None] * (colours + 1)).astype(np.uint8)


def paint(pixels: mpchannel.SharedBuffer, scene: Image, number: int, meter: Meter) -> None:
    import numpy as np

    image = pixels.asarray("uint8", SHAPE)
    with meter.working():
        np.add(scene, np.uint8(number % 256), out=image)


def invert(pixels: mpchannel.SharedBuffer, meter: Meter) -> None:
    import numpy as np

    image = pixels.asarray("uint8", SHAPE)
    with meter.working():
        np.invert(image, out=image)


def make_check() -> Callable[[Frame, Meter], bool]:
    import numpy as np

    scene = make_scene()
    sums, differs = np.empty_like(scene), np.empty(SHAPE, dtype=bool)

    def right(frame: Frame, meter: Meter) -> bool:
        # A colour, and how bright it was made, and what is left to white are together 255.
        image = frame.pixels.asarray("uint8", SHAPE)
        with meter.working():
            np.add(image, scene, out=sums)
            np.not_equal(sums, (255 - frame.number) % 256, out=differs)
            return not differs.any()

    return right


# How they do


class Meter:
    """Reports to main how this process is doing."""

    def __init__(self, reports: Reports) -> None:
        self._reports = reports
        self._frames = 0
        self._faults = 0
        self._due = 0.0
        self.tell()

    @contextmanager
    def working(self) -> Iterator[None]:
        """On the pixels of a frame, all of which are to be there."""
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        yield
        self._faults += resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    def count(self) -> None:
        """After each frame."""
        self._frames += 1
        if self._frames == WARM_UP or time.monotonic() >= self._due:
            self.tell()

    def tell(self) -> None:
        self._due = time.monotonic() + INTERVAL
        self._reports.post_message(Sample(time.monotonic(), self._frames, self._faults, memory()))


def memory() -> int:
    with open("/proc/self/smaps_rollup", "rb") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(b"Pss:"))


@dataclass
class Stage:
    """A process, as main sees it."""

    role: str
    pid: int
    reports: mpchannel.MessagePort[None, Sample]
    samples: list[Sample] = field(default_factory=list)

    @property
    def warm(self) -> list[Sample]:
        return [sample for sample in self.samples if sample.frames >= WARM_UP]

    @property
    def faults_per_frame(self) -> tuple[float, float]:
        """Until it was warm, and from then on."""
        warm = self.warm
        if len(warm) < 2:
            return float("nan"), float("nan")
        first, last = warm[0], warm[-1]
        return first.faults / first.frames, (last.faults - first.faults) / (last.frames - first.frames or 1)


# The main process


def run(count: int, plot: str, start_method: str | None) -> int:
    """Returns 0 if each frame came through all three processes, in order and right."""
    context = mpchannel.get_context(start_method)
    rows, columns, _ = SHAPE
    print(f"{count:,} frames of {columns} x {rows}, {SIZE / 1e6:.1f} MB each, never more than {AHEAD} on their way")
    to_filter, into_filter = mpchannel.MessageChannel()
    to_checker, into_checker = mpchannel.MessageChannel()
    to_camera, into_camera = mpchannel.MessageChannel()
    verdict, for_verdict = mpchannel.MessageChannel()
    works: tuple[tuple[Any, tuple[Any, ...], tuple[Any, ...]], ...] = (
        (camera, (count, to_filter, into_camera), ()),
        (work_as_filter, (into_filter, to_checker), ()),
        (checker, (into_checker, to_camera), (for_verdict,)),
    )
    stages = []
    start = time.monotonic()
    with Children() as children:
        for role, (work, before, behind) in zip(ROLES, works, strict=True):
            reports, for_reports = mpchannel.MessageChannel()
            process = context.Process(target=work, args=(*before, for_reports, *behind), name=role)
            children.start(process)
            assert process.pid is not None
            stages.append(Stage(role, process.pid, reports))
        print("processes:", ", ".join(f"{stage.role} {stage.pid}" for stage in stages), flush=True)
        follow(stages, count)
        try:
            came, wrong = verdict.recv(60)
        except (mpchannel.PortClosedError, TimeoutError) as error:
            print(f"error: the checker has no result: {error}")
            return 1
    print_stages(stages)
    write_plot(stages, start, plot)
    complete = came == list(range(count))
    for number in wrong[:10]:
        print(f"WRONG: frame {number}")
    print(f"{len(came):,} frames came, in order: {'yes' if complete else 'NO'}; wrong: {len(wrong):,}")
    return 0 if complete and not wrong else 1


def follow(stages: Sequence[Stage], count: int) -> None:
    """Take all reports, until the processes have ended."""
    line = ProgressLine()
    by_port = {id(stage.reports): stage for stage in stages}
    while by_port:
        for port in mpchannel.wait([stage.reports for stage in by_port.values()]):
            stage = by_port[id(port)]
            try:
                stage.samples.append(port.recv())
            except mpchannel.PortClosedError as error:
                del by_port[id(port)]
                if error.reason not in ("closed", "collected", "exited"):
                    line.tell(f"{stage.role}, process {stage.pid}: {error}")
                continue
            if stage.role == "checker":
                last = stage.samples[-1]
                line.show(f"{bar(last.frames, count)}  {last.frames:,} frames")
    line.clear()


def print_stages(stages: Sequence[Stage]) -> None:
    rows = []
    for stage in stages:
        warm = stage.warm
        cold_faults, warm_faults = stage.faults_per_frame
        cells = [stage.role, str(stage.pid), f"{stage.samples[-1].frames:,}" if stage.samples else "0"]
        if len(warm) >= 2:
            rate = (warm[-1].frames - warm[0].frames) / (warm[-1].at - warm[0].at)
            peak = max(sample.memory for sample in warm) / 1e6
            cells += [f"{rate:,.0f}", f"{rate * SIZE / 1e6:,.0f}", f"{cold_faults:,.1f}", f"{warm_faults:,.2f}"]
            cells += [f"{warm[0].memory / 1e6:,.1f}", f"{peak:,.1f}"]
        rows.append([*cells, *["-"] * (9 - len(cells))])
    heads = ("", "process", "frames", "frames/s", "MB/s", "faults", "warm", "memory", "at most")
    print_table(heads, rows)
    print(f"faults: page faults in the work on a frame's pixels, on average of the first {WARM_UP} frames;")
    print(f"warm: of those behind. memory: in MB (1,000,000 bytes), after {WARM_UP} frames, and the most from")
    print("then on; of what several processes have mapped, each has its part")


def write_plot(stages: Sequence[Stage], start: float, path: str) -> None:
    """Frames per second, page faults per frame and memory over time, as a picture, if Matplotlib is installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot, as Matplotlib is not installed: pip install mpchannel[plot]")
        return
    figure = Figure(figsize=(8, 8), layout="constrained")
    FigureCanvasAgg(figure)
    rates, faults, sizes = figure.subplots(3, 1, sharex=True)
    for stage in stages:
        samples = stage.samples
        pairs = [(one, two) for one, two in pairwise(samples) if two.frames > one.frames]
        times = [two.at - start for _, two in pairs]
        rates.plot(times, [(two.frames - one.frames) / (two.at - one.at) for one, two in pairs], label=stage.role)
        faults.plot(times, [(two.faults - one.faults) / (two.frames - one.frames) for one, two in pairs])
        sizes.plot([sample.at - start for sample in samples], [sample.memory / 1e6 for sample in samples])
    rates.set_ylabel("frames/s")
    rates.set_ylim(bottom=0)
    faults.set_ylabel("page faults per frame")
    faults.set_ylim(0, max(1.0, faults.get_ylim()[1]))
    sizes.set_ylabel("memory in MB")
    sizes.set_ylim(bottom=0)
    sizes.set_xlabel("seconds")
    rates.set_title(f"{SHAPE[1]} x {SHAPE[0]}, {SIZE / 1e6:.1f} MB a frame")
    rates.legend()
    for axes in (rates, faults, sizes):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    print(f"over time: {os.path.abspath(path)}")


def problem_of(count: int, plot: str) -> str | None:
    if count < 1:
        return f"--frames must be at least 1, not {count}"
    folder = os.path.dirname(os.path.abspath(plot))
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        return f"--plot: cannot write to folder {folder}"
    try:
        import numpy  # noqa: F401
    except ImportError:
        return "demo frames needs NumPy: pip install mpchannel[plot]"
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        return None  # there will be no plot
    ending, kinds = os.path.splitext(plot)[1], ", ".join(sorted(FigureCanvasBase.get_supported_filetypes()))
    if ending[1:].lower() not in kinds.split(", "):
        return f"--plot: {ending or 'no ending'} is no kind of picture that Matplotlib writes: {kinds}"
    return None
