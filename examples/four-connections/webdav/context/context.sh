#!/bin/sh
# Serve /scratch/files by WebDAV (Apache httpd's mod_dav) until the job is cancelled.
set -eu
mkdir -p /scratch/files /scratch/httpd
chown www-data:www-data /scratch/files /scratch/httpd
exec apache2 -d /scratch/httpd -f /context/httpd.conf -D FOREGROUND
