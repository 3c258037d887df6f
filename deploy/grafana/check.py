#!/usr/bin/env python3
"""Asks a Prometheus for every query of the dashboards, and fails where one returns no data.

    deploy/grafana/check.py http://127.0.0.1:9090

The server that it scrapes has to have been used in every way that has a panel: requests with adapters and without, one that was
refused, one whose client left, tokens that were guessed, an experiment; and adapters were loaded within the interval.
"""

import argparse
import json
import math
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

DASHBOARDS = Path(__file__).parent / "dashboards"


def api(prometheus, path, **parameters):
    url = f"{prometheus}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
    try:
        with urllib.request.urlopen(url, timeout=30) as reply:
            return json.load(reply)["data"]
    except urllib.error.HTTPError as refused:
        raise SystemExit(f"{parameters}: {refused.read().decode()}") from None


def queries():
    """The dashboard, the panel and the expression of each."""
    for path in sorted(DASHBOARDS.glob("*.json")):
        dashboard = json.loads(path.read_text())
        for panel in dashboard["panels"]:
            for target in panel["targets"]:
                yield path.stem, panel["title"], target["expr"]


def with_values(expression, interval):
    """The expression as Grafana sends it when all is chosen of each variable."""
    for variable, value in {"$__rate_interval": interval, "$instance": ".*", "$adapter": ".*", "$experiment": ".*"}.items():
        expression = expression.replace(variable, value)
    return expression


def has_data(series):
    return any(not math.isnan(float(one["value"][1])) for one in series)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prometheus", help="its URL")
    parser.add_argument("--interval", default="1m", help="of rates; at least four scrapes (%(default)s)")
    arguments = parser.parse_args()

    empty = []
    count = 0
    for dashboard, panel, expression in queries():
        count += 1
        result = api(arguments.prometheus, "query", query=with_values(expression, arguments.interval))["result"]
        if not has_data(result):
            empty.append(f"{dashboard}: {panel}: no data for {expression}")
    print(*empty, sep="\n", file=sys.stderr)
    print(f"{count - len(empty)} of {count} queries return data")
    return 1 if empty or not count else 0


if __name__ == "__main__":
    sys.exit(main())
