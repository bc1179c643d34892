"""Small networks on data that is present on any machine: every optimizer tuned and tested by one protocol."""
