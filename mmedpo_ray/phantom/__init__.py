"""The phantom world: synthetic chest radiographs with ground truth, and a tiny LLaVA that knows them."""
