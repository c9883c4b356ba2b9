"""Work for strangers: in processes of their own, which bound themselves."""
