"""resplit: adaptive split inference of large foundation models over unequal edge machines."""
