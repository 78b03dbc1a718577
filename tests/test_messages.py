"""A search for the words of any message finds its page: docs/messages.md lists the messages of the source."""

import re

import pytest

from rawloop.cli import main
from tests.message_index import PAGE, ROOT, index, messages, page_of, written


def test_the_page_has_the_messages_of_the_source() -> None:
    assert PAGE.read_text(encoding="utf-8") == written(), "run `python tests/message_index.py`"


def test_every_module_with_messages_has_a_page_that_exists() -> None:
    for page in index():
        assert page.endswith(".md"), f"{page} has messages: give it a page in tests/message_index.py"
        assert (ROOT / "docs" / page).is_file()
    assert page_of("cli/doctor.py") == "correctness.md"
    assert page_of("nowhere.py") is None


def test_messages_are_found_with_their_gaps() -> None:
    source = (
        'raise UserError(f"{key} is {value}: it must be above 0" f" and below {most}")\nrecord.fail("no" + f" {x}")'
    )
    assert list(messages(source)) == ["… is …: it must be above 0 and below …"]


@pytest.mark.parametrize("key", ["train.accumulation", "data.max_seconds"])
def test_a_message_that_a_user_reads_is_found(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", f"--{key}", "-1", "--model.path", "x"]) == 2
    said = capsys.readouterr().err.partition(": ")[2].strip()
    patterns = [
        re.escape(text).replace("…", ".*") for texts in index().values() for text in texts if len(text.split()) > 5
    ]
    assert any(re.match(pattern, said) for pattern in patterns), said
