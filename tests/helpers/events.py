"""What TensorBoard shows of event files, read without it."""

from tensorboardX.proto.event_pb2 import Event, SessionLog


def events_of(path):
    """The events of a file, up to the first that is not whole."""
    data, position = path.read_bytes(), 0
    while position + 16 <= len(data):
        length = int.from_bytes(data[position : position + 8], "little")
        end = position + 12 + length + 4
        if end > len(data):
            return
        yield Event.FromString(data[position + 12 : end - 4])
        position = end


def shown(folder):
    """{(tag, step): value} as TensorBoard reads a run, its files in order of their names.

    A tag's event takes back those of its step and later ones, and so does every start of a session
    but the first for all tags (of the two readers that TensorBoard has, the fast one knows only the
    former, the slow one only the latter).
    """
    found, started = {}, False
    for path in sorted(folder.glob("*tfevents*")):
        for event in events_of(path):
            if event.session_log.status == SessionLog.START:
                kept = {key: value for key, value in found.items() if key[1] < event.step}
                found, started = kept if started else found, True
            for value in event.summary.value:
                later = {key for key in found if key[0] == value.tag and key[1] >= event.step}
                found = {key: found[key] for key in found if key not in later}
                found[value.tag, event.step] = value
    return found


def read_tensorboard(folder):
    """[(tag, step, number or 'image')] of what TensorBoard shows."""
    return [
        (tag, step, "image" if value.HasField("image") else value.simple_value)
        for (tag, step), value in shown(folder).items()
    ]
