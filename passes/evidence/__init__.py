"""What identifies a gate: selections, routers, the uses of ids and routing weights, experts."""
