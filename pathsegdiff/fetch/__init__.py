"""Files from the network: transfers that resume, archives that are not trusted, licences."""
