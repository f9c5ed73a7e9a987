"""What is measured of this project. It is no part of what is installed: run it from the root of a working copy."""
