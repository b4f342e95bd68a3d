-- Whether RQ's `enqueue` has saved another job over this id, for a hash whose started_at is empty: a new job has not
-- begun, and was created at another date. entered: two dates that the last claim or end has seen, of the last enqueue
-- and of the creation. Without it the request was only submitted; then it has the timeout -1, and a new job mostly has
-- another one. Saving an old copy of the job (`job.meta[…] = …; job.save()`) empties started_at too, but it is still
-- the same job.
local function saved_over(entered, created_at, timeout)
  if entered then return created_at ~= string.match(entered, ' (.*)$') end
  return (timeout or '-1') ~= '-1'
end

-- Whether the caller's execution is the current one of the job that has this id now. current, started_at: of its hash.
local function owns(id, execution, current, started_at)
  if execution == '' or current ~= execution then return false end
  if started_at ~= '' then return true end
  local job = redis.call('HMGET', KEY.job .. id, 'entered', 'created_at', 'timeout')
  return not saved_over(job[1], job[2], job[3] or nil)
end
