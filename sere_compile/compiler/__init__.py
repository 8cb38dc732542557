"""The torch.compile side of the backend: plans for gates, graphs bound to weights, Dynamo's bookkeeping."""
