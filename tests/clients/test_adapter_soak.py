"""A short soak; adapter_soak.py by itself runs the long one."""

from adapter_soak import Soak, run


def test_requests_get_their_generation_while_adapters_come_and_go():
    report = run(Soak(num_adapters=16, num_resident=4, num_clients=4, seconds=15))
    assert report.faults == []
    assert report.requests > 50 and report.evictions > 5 and all(report.changes.values()), report
