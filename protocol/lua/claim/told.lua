-- What is measured and traced of a request; mostly the date of its submit alone.
local function told(job)
  local again = job.enqueued_at ~= job.created_at
  if not (again or job.interrupted or job.trace) then return job.created_at or '' end
  return table.concat({ job.created_at or '', again and job.enqueued_at or '', job.trace or '',
    job.interrupted or '' }, '\t')
end
