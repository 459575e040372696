"""Files: put-if-absent on a disk and on object stores."""
