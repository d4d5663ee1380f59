"""event_files.py: what TensorBoard's files lack on a full disk is written when there is room; a run never ends for them."""

import struct

import tensorboardX
from tensorboardX.proto import event_pb2

from rahf import event_files


def scalars(folder):
    """(step, value) of each scalar in the one event file of a folder: length, checksum, event, checksum, and so on."""
    (file,) = folder.iterdir()
    data, found = file.read_bytes(), []
    while data:
        (length,) = struct.unpack("Q", data[:8])
        event = event_pb2.Event.FromString(data[12 : 12 + length])
        found += [(event.step, value.simple_value) for value in event.summary.value]
        data = data[16 + length :]
    return found


def test_events_wait_for_room_and_are_written_once(tmp_path, monkeypatch):
    folder, real = tmp_path / "a:b" / "tensorboard", open

    def full(path, *arguments):
        return real("/dev/full" if "tfevents" in str(path) else path, *arguments)

    writer = tensorboardX.SummaryWriter(event_files.address(folder))
    writer.add_scalar("loss", 1.0, 1)
    writer.flush()
    monkeypatch.setattr("builtins.open", full)
    for step in (2, 3):
        writer.add_scalar("loss", float(step), step)
        writer.flush()
    monkeypatch.undo()
    writer.close()
    assert scalars(folder) == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_a_file_that_cannot_be_written_is_told_once(tmp_path, capsys):
    file = event_files.DiskFile(f"disk:{tmp_path}/gone/events")
    for _ in range(2):
        file.write(b"data")
        file.flush()
    expected = f"WARNING: {tmp_path}/gone/events: not written, tried again at each flush: [Errno 2] No such file"
    assert capsys.readouterr().err.startswith(expected) and not (tmp_path / "gone").exists()
    (tmp_path / "gone").mkdir()
    file.close()
    assert (tmp_path / "gone/events").read_bytes() == b"datadata" and capsys.readouterr().err == ""
