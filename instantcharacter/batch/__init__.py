"""Many pictures: jobs from a file, batches of lines alike, in any number of processes; an interrupted job goes on."""
