"""Model families: tables that say where a model's blocks, linear layers and activations are."""
