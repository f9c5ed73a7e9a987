"""An alert from /metrics, for those without a Prometheus: control that budgets hold back too often.

Two readings give rates, as Prometheus' `rate` does. Exit status 1 says that the alert fires. The complete rules are in
deploy/prometheus/alerts.yml. This alert would be, there:

    - alert: ControlHeldBack
      expr: rate(recontrol_budget_limited_tokens_total[5m]) > 0.8 * rate(recontrol_edit_kl_count[5m])
      for: 10m
"""

from __future__ import annotations

import argparse
import sys
import time

import httpx
from prometheus_client.parser import text_string_to_metric_families


def totals(url: str) -> dict[str, float]:
    """Each sample's sum over its labels, by name."""
    page = httpx.get(f"{url}/metrics")
    page.raise_for_status()
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(page.text):
        for sample in family.samples:
            sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    return sums


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--seconds", type=float, default=10.0, help="time between the two readings")
    parser.add_argument("--share", type=float, default=0.8, help="fire above this share of controlled tokens")
    args = parser.parse_args()
    before = totals(args.url)
    time.sleep(args.seconds)
    after = totals(args.url)
    grown = {name: after[name] - before.get(name, 0.0) for name in after}
    controlled = grown.get("recontrol_edit_kl_count", 0.0)
    if not controlled:
        print("No tokens were drawn under control.")
        return 0
    held = grown.get("recontrol_budget_limited_tokens_total", 0.0) / controlled
    mean_kl = grown["recontrol_edit_kl_sum"] / controlled
    print(f"{controlled:.0f} controlled tokens, {mean_kl:.3f} nats each, {held:.0%} held back by a budget")
    return int(held > args.share)


if __name__ == "__main__":
    sys.exit(main())
