"""torchrun, except that it ends with the exit code of its workers: 75 must reach the scheduler, torchrun makes it 1.

The workers' first process on this machine writes its code into a file; torchrun itself keeps only that one has failed.
A crash leaves no code, and torchrun's own ending stands.

SLURM sends SIGUSR1 to every process of a job. torchrun would die of it, and so would a worker that is still importing;
one that ignored it would not learn of it. So it is blocked here, and workers inherit that: it waits until they take it.
Sent to torchrun alone, it is passed on: as a file that workers look for, so that those that start later find it too.
"""

import os
import signal
import sys
import threading
from pathlib import Path
from tempfile import TemporaryDirectory


def run(arguments: list[str], folder: Path) -> int:
    """Run torchrun; return the exit code that the workers left in `folder`, if it has failed."""
    from torch.distributed.run import main  # starts threads, which must inherit what is blocked

    file = folder / "code"
    os.environ["RAWLOOP_EXIT_CODE_FILE"] = str(file)
    try:
        main(arguments)
    except Exception as error:
        code = file.read_text() if file.exists() else "0"
        if code in ("0", "1"):
            raise
        print(f"torchrun: {type(error).__name__}; exit code {code} of the workers stands", file=sys.stderr)
        return int(code)
    return 0


def pass_sigusr1_on(file: Path) -> None:
    """Block SIGUSR1 in this process and in those that it starts; make `file`, which workers look for, once it comes."""
    os.environ["RAWLOOP_SIGNAL_FILE"] = str(file)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)  # ignored, as the scripts leave it, it would be lost

    def wait() -> None:
        signal.sigwait({signal.SIGUSR1})
        file.touch()

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    with TemporaryDirectory() as made:
        pass_sigusr1_on(Path(made) / "SIGUSR1")
        code = run(sys.argv[1:], Path(made))
    sys.exit(code)
