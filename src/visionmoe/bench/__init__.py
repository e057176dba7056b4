"""How fast the layer and the models are on this machine, against dense ones and against what the machine can do."""
