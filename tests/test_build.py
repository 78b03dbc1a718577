"""What assembly finds out before it builds anything."""

from pathlib import Path

import pytest

from rawloop.build import stored_precision


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b'{"mode": "bf16"}', None])
def test_a_precision_that_cannot_be_read_is_left_to_restoring(content: bytes | None, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    if content is not None:
        (tmp_path / "state/precision.json").write_bytes(content)
    assert stored_precision(tmp_path) is None
    (tmp_path / "state/precision.json").write_text('{"mode": "bf16", "reason": "x", "history": []}')
    assert stored_precision(tmp_path) == {"mode": "bf16", "reason": "x", "history": []}
    assert stored_precision(None) is None
