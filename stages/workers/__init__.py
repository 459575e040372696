"""What any stage is handed, and how several workers share the rows of one."""
