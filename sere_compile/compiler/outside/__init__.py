"""The parts of the proof of what becomes of ids that leave their graph: the code that receives them is run."""
