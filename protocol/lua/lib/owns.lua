-- Whether another job than the one that was claimed last has been saved over a hash whose started_at is empty: RQ's `enqueue`
-- with an id that is there saves a new one, which has not begun and was created at another date. entered: dates of the last
-- coming into the queue that a claim, or an end, has seen, and of the creation. Without it, nobody has put it there but its
-- submit; such a request has the timeout -1, and a new job mostly has not. Somebody who saves an old copy of a job
-- (`job.meta[…] = …; job.save()`) empties started_at as well, and makes no other job of it.
local function saved_over(entered, created_at, timeout)
  if entered then return created_at ~= string.match(entered, ' (.*)$') end
  return (timeout or '-1') ~= '-1'
end

-- Whether the caller's execution is the current one of this job, and not of one that another was saved over.
local function owns(id, execution, current, started_at)
  if execution == '' or current ~= execution then return false end
  if started_at ~= '' then return true end
  local job = redis.call('HMGET', KEY.job .. id, 'entered', 'created_at', 'timeout')
  return not saved_over(job[1], job[2], job[3] or nil)
end
