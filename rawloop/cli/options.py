"""The options of each command, besides the keys of a run's config. Needs no torch: `--help` is made of them."""

import math
from dataclasses import dataclass, field
from typing import Literal

from rawloop.errors import UserError
from rawloop.precision.config import Name

Device = Literal["auto", "cuda", "mps", "cpu"]


@dataclass
class DemoOptions:
    """Where the demo is put.

    Args:
        folder: where to put the checkpoint, the speech and its codes.
    """

    folder: str = ".demo"


@dataclass
class PrepareOptions:
    """What `rawloop prepare` does besides encoding.

    Args:
        report: also measure every clip, and write a page of the data into this file, with a .json beside it; needs
            `rawloop[report]`.
    """

    report: str | None = None


@dataclass
class InspectOptions:
    """What is shown.

    Args:
        split: of which data.
        sample: the id of a sample: only that one. Default: the first batch, of train as it is shuffled.
    """

    split: Literal["train", "eval"] = "train"
    sample: str | None = None


@dataclass
class PlanOptions:
    """For which batches and processes.

    Args:
        positions: positions of each sample of a micro-batch that is made up; 0 takes the batches of data.train.
        samples: samples of that micro-batch; 0 is train.batch_size.
        processes: how many processes will train together, each on its own card.
        utilisation: the share of a card's peak speed that training reaches, for the times.
    """

    positions: int = 0
    samples: int = 0
    processes: int = 1
    utilisation: float = 0.4

    def __post_init__(self) -> None:
        for name, least in (("positions", 0), ("samples", 0), ("processes", 1)):
            if not least <= getattr(self, name) < 1e9:
                raise UserError(f"--{name} is {getattr(self, name)}: it must be {least} or more")
        if not 0 < self.utilisation <= 1:
            raise UserError(f"--utilisation is {self.utilisation:g}: it must be above 0 and at most 1")
        if self.samples and not self.positions:
            raise UserError(f"--samples is {self.samples} without --positions: give both, or neither")


@dataclass
class FromTrainerOptions:
    """Of which files a config is made.

    Args:
        file: training_args.json, adapter_config.json, a .py file with TrainingArguments(...), a .yaml of axolotl or
            LLaMA-Factory, or ms-swift's args.json; several files are put together.
        output: the config to write, a .yaml file.
        force: replace the output.
    """

    file: list[str]
    output: str
    force: bool = False


@dataclass
class EvaluateOptions:
    """What is evaluated.

    Args:
        checkpoint: best, latest, or a checkpoint's folder of this config's run. Default: the base model.
    """

    checkpoint: str | None = None


@dataclass
class ReportOptions:
    """Of which runs a page is made.

    Args:
        run: a run's folder.
        compare: the folders of several runs, whose curves are overlaid.
        output: the page. Default: report.html in the run's folder, or compare.html here.
    """

    run: str | None = None
    compare: list[str] = field(default_factory=list)
    output: str | None = None

    def __post_init__(self) -> None:
        if bool(self.run) == bool(self.compare):
            raise UserError("name a run's folder, or several after --compare; `rawloop report --help` shows how")


@dataclass
class VerifyOptions:
    """What is verified.

    Args:
        run: a run's folder, or the folder of one checkpoint.
    """

    run: str


@dataclass
class ReplayOptions:
    """Which step runs again, and how.

    Args:
        capsule: a folder such as RUN/capsules/step-00000041-rank0.
        precision: another mode, to see whether the mode is to blame.
        device: where to run it.
        bisect: find the batch, sample, module and parameter.
        shell: open a Python prompt with everything loaded.
        model: package.module:function that builds the model of a foreign loop.
    """

    capsule: str
    precision: Name | None = None
    device: Device = "auto"
    bisect: bool = False
    shell: bool = False
    model: str | None = None


@dataclass
class ProbeOptions:
    """What is written.

    Args:
        json: also write the measurements into this file.
    """

    json: str | None = None


@dataclass
class CompareOptions:
    """How the modes are compared.

    Args:
        reference: what losses and gradients are compared with.
        steps: steps of the race; 0 for no race.
        json: also write the measurements into this file.
        html: also write a page into this file; needs `rawloop[report]`.
    """

    reference: Literal["fp32", "fp64"] = "fp32"
    steps: int = 20
    json: str | None = None
    html: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.steps < math.inf:
            raise UserError(f"--steps is {self.steps}: it must be a whole number, 0 for no race")


@dataclass
class LaunchCheckOptions:
    """How long the check may take.

    Args:
        seconds: how long processes wait for each other to come and to answer, in place of ddp.timeout.
    """

    seconds: float = 60.0

    def __post_init__(self) -> None:
        if not 0 < self.seconds < 1e6:
            raise UserError(f"--seconds is {self.seconds:g}: it must be above 0 and below 1,000,000")


@dataclass
class DoctorOptions:
    """What one of the doctor's own processes does.

    Args:
        part: measure gradients and the evaluation loss into this file, as one of several processes.
    """

    part: str | None = field(default=None, metadata={"hidden": True})
