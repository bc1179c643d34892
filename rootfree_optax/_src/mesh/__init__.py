"""Where stacks are: whole, divided over a mesh, or one device's own part."""
