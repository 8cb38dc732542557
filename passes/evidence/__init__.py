"""What tells a gate: selections, routers, what ids and routing weights are used for, experts behind them."""
