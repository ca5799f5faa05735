"""Which overlap measure recovers a planted entanglement: worlds, models, maps, measures, scores."""
