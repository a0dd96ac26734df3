"""What the engines share whose model runs in a server process and is reached by HTTP."""
