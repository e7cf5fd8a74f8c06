"""`plan`: from a configuration to a report."""

import json

from llama_jax.plan.estimate import estimate
from llama_jax.plan.hardware import parse_topology
from llama_jax.plan.report import print_plan, print_search
from llama_jax.plan.search import search
from llama_jax.plan.settings import PlanConfig


def plan(config: PlanConfig) -> int:
    """Prints whether a run or a decoder fits a machine and how fast it can go; returns 0.

    Raises:
        ConfigError: there is no such machine, or the configuration does not fit it.
    """
    topology = parse_topology(config.topology, config.slices)
    if config.search:
        found = search(config, topology)
        if config.as_json:
            print(json.dumps(found, indent=2))
        else:
            print_search(found, topology)
        return 0
    record = estimate(config, topology, config.compiled)
    if config.as_json:
        print(json.dumps(record, indent=2))
    else:
        print_plan(record)
    return 0
