--- @include lib/lease/owns

-- Whether somebody has enqueued this id since its last claim: 'same' for the same job once more (`enqueue_job`), 'new'
-- if RQ's `enqueue` saved another job over it, which has not begun; else nil. RQ writes a date at each enqueue. If it
-- is the one that the last claim has seen, or that of the submit, somebody with an old copy of the job has only written
-- it back. Dates are compared for equality, never for order: they come from the clocks of many producers.
local function enqueued_again(job)
  if job.started_at == '' and saved_over(job.entered, job.created_at, job.timeout) then return 'new' end
  local date, seen = job.enqueued_at or '', job.entered and string.match(job.entered, '^(.*) ')
  return date ~= '' and date ~= (seen or job.created_at) and date ~= job.created_at and 'same' or nil
end

-- The fields that enqueued_again() needs, and the status.
local function read_dates(id)
  local names, job = { 'status', 'started_at', 'enqueued_at', 'created_at', 'entered', 'timeout' }, {}
  for i, value in ipairs(redis.call('HMGET', KEY.job .. id, unpack(names))) do job[names[i]] = value or nil end
  return job
end
