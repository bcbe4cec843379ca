"""What a run says of saves that take longer than it is given to stop."""

from megatron_mm.training.stop import Patience, Stop


def test_a_slow_save_is_told_once_with_what_to_raise():
    patience = Patience()
    assert patience.lines(None) == patience.lines(25.0) == []
    (line,) = patience.lines(40.2)
    for word in (
        "took 40 s",
        "--shutdown-timeout 81",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=81",
        "--signal=B:USR1@81",
        "KillWait",
        "terminationGracePeriodSeconds: 81",
    ):
        assert word in line
    assert patience.lines(99.0) == []


def test_a_process_that_takes_no_signals_never_stops():
    """In-process uses of the trainer: no collective either, for there is no process group here."""
    assert not Stop().agreed()
