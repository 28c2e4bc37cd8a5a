"""A range of steps on a command line."""

from absl import flags


class _StepsParser(flags.ArgumentParser):
    """ "START:STOP", STOP left out, as a range."""

    def parse(self, argument: str | range) -> range:
        if isinstance(argument, range):
            return argument
        first, _, stop = argument.partition(":")
        if not (first.isdecimal() and stop.isdecimal() and 1 <= int(first) < int(stop)):
            raise ValueError(
                f"{argument!r}: wants START:STOP with 1 <= START < STOP, such as 10:13"
            )
        return range(int(first), int(stop))


STEPS = _StepsParser()
"""For `flags.DEFINE`: an absl flag whose value is a range of steps."""
