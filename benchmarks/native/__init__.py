"""C sources that are built when a run asks for them."""
